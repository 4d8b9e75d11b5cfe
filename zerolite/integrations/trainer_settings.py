"""What `zero=` of a Trainer may say, and which TrainingArguments cannot stand beside it."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from zerolite.config import Precision
from zerolite.engine import build
from zerolite.engine.engine import find_engine
from zerolite.foreign.deepspeed import CLIPPING
from zerolite.integrations import deepspeed_config
from zerolite.optim.adam import Adam
from zerolite.optim.adamw import AdamW
from zerolite.optim.base import ShardedOptimizer
from zerolite.optim.lamb import Lamb
from zerolite.optim.lion import Lion
from zerolite.shards.layout import Partition

_SHARD = ("stage", "mesh", "offload", "units")
_NAMES = (*_SHARD, "precision", "optimizer", "training")
_MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16}

OPTIMIZERS: dict[str, type[ShardedOptimizer]] = {"AdamW": AdamW, "Adam": Adam, "Lamb": Lamb, "Lion": Lion}
OPTIMS = {"adamw_torch": "AdamW", "adamw_torch_fused": "AdamW", "lion_32bit": "Lion"}


def from_deepspeed(config: Mapping[str, Any] | str | os.PathLike) -> dict[str, Any]:
    """`zero=` of a Trainer from a DeepSpeed configuration, a dict or the path of a JSON file.

    It is what TrainingArguments(deepspeed=...) was given. Every key is used, not needed, or refused by name. "Adam"
    there means AdamW. Values "auto" come from TrainingArguments; others must be those of TrainingArguments, or the
    trainer raises ValueError with both.

    Raises ValueError that lists all keys without a counterpart.
    """
    found = deepspeed_config.read(config)
    zero: dict[str, Any] = dict(stage=found.stage, precision=found.precisions, training=found.training)
    if found.offload is not None:
        zero["offload"] = found.offload
    if found.optimizer is not None:
        zero["optimizer"] = found.optimizer
    return zero


class ZeroSettings:
    """`zero=` of a Trainer, checked.

    shard: arguments of zerolite.shard but the precision; None for a model that is sharded already.
    precision: a Precision, or one for each mixed precision of TrainingArguments ("bf16", "fp16"); None: see
        `precision_of`.
    optimizer: the name of an optimizer of zerolite; None: TrainingArguments.optim tells.
    training: values that TrainingArguments must have, by name.
    """

    def __init__(self, zero: Mapping[str, Any] | None):
        self.shard: dict[str, Any] | None = None
        self.precision: Precision | Mapping[str, Precision] | None = None
        self.optimizer: str | None = None
        self.training: Mapping[str, Any] = {}
        if zero is None:
            return
        if not isinstance(zero, Mapping):
            raise TypeError(f"zero= takes a dict such as dict(stage=2), got {type(zero).__name__}")
        unknown, missing = sorted(set(zero) - set(_NAMES)), {"stage"} - set(zero)
        if unknown or missing:
            what = f"does not know {', '.join(unknown)}" if unknown else "needs a stage"
            raise ValueError(f"zero= {what}: its names are {', '.join(_NAMES)}")
        self.shard = {name: zero[name] for name in _SHARD if name in zero}
        self.precision, self.optimizer = zero.get("precision"), zero.get("optimizer")
        self.training = zero.get("training", {})
        single = self.precision if not isinstance(self.precision, Mapping) else None
        self.shard["offload"] = build.check_arguments(self.shard["stage"], self.shard.get("offload"), single)
        if self.optimizer is not None and self.optimizer not in OPTIMIZERS:
            raise ValueError(f"zero=dict(optimizer=...) is one of {', '.join(OPTIMIZERS)}; got {self.optimizer!r}")

    def partition_of(self, model: nn.Module) -> Partition:
        engine = find_engine(model)
        if engine is not None:
            return engine.partition
        assert self.shard is not None, "check_model has been asked"
        return Partition(self.shard["stage"])

    def check_model(self, model: object) -> None:
        """ValueError where it is said nowhere, or twice, how the model is sharded."""
        is_sharded = isinstance(model, nn.Module) and find_engine(model) is not None
        if is_sharded and self.shard is not None:
            raise ValueError("the model is sharded already: drop zero=, or give the trainer the model before shard")
        if not is_sharded and self.shard is None:
            raise ValueError("a ZeroTrainer takes zero=dict(stage=...), or a model that zerolite has sharded")

    def precision_of(self, args: TrainingArguments, model: nn.Module | None) -> Precision | None:
        """How the parameters are cast; None: they stay as they are, in Accelerate's autocast where `args.bf16`.

        ValueError for a mixed precision that zerolite has not, or has in another dtype.
        """
        mixed = args.mixed_precision
        if mixed not in ("no", *_MIXED):
            raise ValueError(f"mixed precision {mixed!r} beside zero=: take bf16=True or fp16=True")
        engine = find_engine(model) if model is not None else None
        precision = engine.precision if engine is not None else self.precision
        if isinstance(precision, Mapping):
            precision = precision.get(mixed)
        elif precision is None and mixed == "fp16" and engine is None:
            precision = Precision(torch.float16)
        given = precision.param if precision is not None else None
        if (mixed == "fp16" or given is not None) and mixed in _MIXED and given is not _MIXED[mixed]:
            raise ValueError(
                f"{mixed}=True, and the model's precision is {given}: give precision=zerolite.Precision("
                f"{_MIXED[mixed]}) in zero=, or to shard or load_pretrained, or another TrainingArguments({mixed}=...)"
            )
        return precision

    def check_arguments(self, args: TrainingArguments, model: nn.Module) -> None:
        """ValueError for TrainingArguments that cannot stand beside zero=, or are not those of `training`."""
        shards_parameters = self.partition_of(model).shards_parameters
        refused = {
            "deepspeed": (args.deepspeed, "zero=zerolite.integrations.transformers.from_deepspeed(...) reads it"),
            "fsdp": (args.fsdp, "zero=dict(stage=3) shards parameters as FSDP does"),
            "parallelism_config": (args.parallelism_config, "zero= shards over all ranks"),
            "save_on_each_node": (args.save_on_each_node, "checkpoints need one folder that all ranks see"),
            "bf16_full_eval": (args.bf16_full_eval, "sharded parameters keep their dtype: precision= casts them"),
            "fp16_full_eval": (args.fp16_full_eval, "sharded parameters keep their dtype: precision= casts them"),
            "auto_find_batch_size": (
                args.auto_find_batch_size and args.world_size > 1,
                "a rank that runs out of memory alone would leave the others waiting: find the size on one process",
            ),
            "sync_ref_model": (
                getattr(args, "sync_ref_model", False) and shards_parameters,
                "it reads parameters that stage 3 has sharded: take a stage below",
            ),
        }
        for name, (value, reason) in refused.items():
            if value:
                raise ValueError(f"TrainingArguments({name}=...) cannot stand beside zero=: {reason}")
        if args.n_gpu > 1:
            raise ValueError(
                f"this process sees {args.n_gpu} GPUs, which Trainer would use by DataParallel: start one process a "
                "GPU with torchrun, or make one visible (CUDA_VISIBLE_DEVICES)"
            )
        self._compare(args)

    def _compare(self, args: TrainingArguments) -> None:
        rows = args.world_size * args.per_device_train_batch_size * args.gradient_accumulation_steps
        wrong = []
        for name, expected in self.training.items():
            actual = rows if name == "train_batch_size" else getattr(args, name)
            if name in _MIXED and expected != actual and not expected:
                wrong.append(f"{name}.enabled is false, TrainingArguments({name}=True)")
            elif actual != expected and str(getattr(actual, "value", actual)) != str(expected):
                is_default = name == "max_grad_norm" and expected == CLIPPING
                said = " (or the file has no gradient_clipping: say 0 there for none)" if is_default else ""
                wrong.append(f"{name}={expected!r}{said}, TrainingArguments have {actual!r}")
        if wrong:
            raise ValueError(
                "the DeepSpeed configuration and TrainingArguments differ:\n  "
                + "\n  ".join(wrong)
                + '\nSay the same in both; "auto" takes the value of TrainingArguments'
            )

    def optimizer_of(self, args: TrainingArguments) -> tuple[type[ShardedOptimizer], dict[str, Any]]:
        """zerolite's optimizer and its arguments, by `optimizer`, else by `args.optim`; ValueError for another one."""
        name = self.optimizer or OPTIMS.get(str(getattr(args.optim, "value", args.optim)))
        if name is None:
            raise ValueError(
                f"optim={str(args.optim)!r} is not among zerolite's: TrainingArguments(optim=...) is one of "
                f"{', '.join(OPTIMS)}; zero=dict(optimizer=...) names {', '.join(OPTIMIZERS)}"
            )
        kind = OPTIMIZERS[name]
        options: dict[str, Any] = dict(lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2))
        if kind is not Lion:
            options["eps"] = args.adam_epsilon
        return kind, options
