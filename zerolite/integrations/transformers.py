"""Trainers of transformers and TRL on sharded models: `zero=dict(stage=3, offload="cpu")` beside their arguments.

    ZeroTrainer(model, args, zero=dict(stage=2), train_dataset=...)      transformers.Trainer
    class ZeroSFT(ZeroMixin, trl.SFTTrainer): pass                       any other trainer: the mixin stands first

The model is sharded at its first use, a training or an evaluation: layers, adapters and embeddings may change before.
What a trainer does is left to it; overridden is what would wrap, move, clip, step, save or load whole parameters.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from torch import nn
from transformers import Trainer

import zerolite
from zerolite.config import Offload
from zerolite.engine.engine import Engine, engine_of, find_engine
from zerolite.integrations.trainer_files import is_peft_model, write_model
from zerolite.integrations.trainer_settings import ZeroSettings, from_deepspeed
from zerolite.optim.base import ShardedOptimizer

__all__ = ["ZeroMixin", "ZeroTrainer", "from_deepspeed"]

STATES = "zerolite"  # the folder of zerolite.save inside a checkpoint of Trainer's

TESTED = "transformers 5.17 to 5.24 with accelerate 1.12 to 1.15"

# Methods that `ZeroMixin` overrides or calls and that no documentation promises, by the library that has them.
PRIVATE = {
    "transformers": (
        "create_accelerator_and_postprocess", "_build_accelerator_args", "_move_model_to_device", "_wrap_model",
        "_clip_grad_norm", "_get_grad_norm", "_save", "_save_optimizer_and_scheduler", "_load_from_checkpoint",
        "_load_optimizer_and_scheduler", "_load_best_model",
    ),
    "trl": ("_precompute_ref_logps",),
}  # fmt: skip

# To a reader of types the mixin is a Trainer; at run time it stands before one.
_Base: Any = Trainer if TYPE_CHECKING else object


class ZeroMixin(_Base):
    """Before a class of transformers' Trainer: it trains on shards.

    zero: arguments of zerolite.shard (stage, mesh, offload, precision, units), and `optimizer`, "AdamW", "Adam",
        "Lamb" or "Lion", where it is not TrainingArguments.optim; or what `from_deepspeed` gives. None for a model that
        is sharded already (load_pretrained).

    Every rank must run it alike. bf16=True computes in Accelerate's autocast, and fp16=True is
    `precision=Precision(torch.float16)`; a precision in zero= casts the parameters instead, as DeepSpeed does.
    A checkpoint holds whole weights as the hub has them, and in its folder "zerolite" what `zerolite.load` resumes
    from, at any stage and world size. A reference model (DPO) is sharded as the model is.

    Raises ValueError for zero= and TrainingArguments that cannot stand together, and TypeError or ValueError for an
    optimizer that is not zerolite's and that `zerolite.like` does not know, before anything is trained. Raises
    ImportError for a transformers whose Trainer lacks a method of `PRIVATE`.
    """

    def __init__(self, *args, zero: Mapping[str, Any] | None = None, **kwargs):
        own = super()
        gone = [name for name in PRIVATE["transformers"] if not hasattr(own, name)]
        if gone:
            raise ImportError(
                f"Trainer of transformers {transformers.__version__} has no {', '.join(gone)}, which zerolite "
                f"overrides or calls: install one of {TESTED}"
            )
        self._shard_settings = ZeroSettings(zero)
        self._sharded: nn.Module | None = None  # the model that `_prepared` is
        self._prepared: nn.Module | None = None  # what the loop calls
        self._compile_options: dict[str, Any] | None = None  # of torch.compile; None: nothing is compiled
        super().__init__(*args, **kwargs)

    # Before training #

    def create_accelerator_and_postprocess(self) -> None:
        if self.model is not None:
            self._shard_settings.check_model(self.model)
        elif self._shard_settings.shard is None:
            raise ValueError("model_init builds models that are not sharded: give zero=dict(stage=...)")
        self._shard_settings.check_arguments(self.args, self.model if self.model is not None else nn.Module())
        super().create_accelerator_and_postprocess()
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            other = "DeepSpeed" if self.is_deepspeed_enabled else "FSDP"
            raise ValueError(f"`accelerate launch` is configured for {other}, which zero= replaces: launch without it")
        plugin = self.accelerator.state.dynamo_plugin
        if plugin.backend != DynamoBackend.NO:  # Accelerate would compile through the hooks
            self._compile_options = plugin.to_kwargs()
            self.accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend="no")
        self.accelerator.no_sync = lambda model: zerolite.no_sync(model)
        self._prepare_whole = self.accelerator.prepare_model
        self.accelerator.prepare_model = self._prepare_model

    def _build_accelerator_args(self, **kwargs) -> dict[str, Any]:
        arguments = super()._build_accelerator_args(**kwargs)
        if self._shard_settings.precision_of(self.args, self.model) is not None:
            arguments["mixed_precision"] = "no"  # neither autocast nor a scaler: the parameters are cast
        return arguments

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """The model goes to the device when it is sharded, a unit at a time."""

    def _shard_model(self) -> nn.Module:
        """What the loop calls: the sharded model, in autocast, its units compiled. Collective at its first use."""
        if self._sharded is not self.model:
            if find_engine(self.model) is None:
                precision = self._shard_settings.precision_of(self.args, self.model)
                zerolite.shard(self.model, precision=precision, **(self._shard_settings.shard or {}))
            self._check_ranks(engine_of(self.model))
            if self._compile_options is not None:
                zerolite.compile(self.model, **self._compile_options)
            self.model._is_accelerate_prepared = False  # whoever said so put it in no autocast
            self._prepared = self._prepare_whole(self.model, device_placement=False, evaluation_mode=True)
            self._sharded = self.model
        assert self._prepared is not None
        return self._prepared

    def _check_ranks(self, engine: Engine) -> None:
        """ValueError where the trainer gives batches to other ranks, or to another device, than the engine has."""
        if engine.mesh.world_size != self.args.world_size:
            raise ValueError(
                f"the model is sharded over {engine.mesh.world_size} ranks, and the trainer sees "
                f"{self.args.world_size}: where no GPU is visible, torchrun's ranks are the trainer's with "
                "TrainingArguments(use_cpu=True)"
            )
        batches = torch.empty(0, device=self.args.device).device
        if engine.device.device != batches:
            raise ValueError(
                f"the trainer moves batches to {batches}, and the model is sharded on {engine.device.device}: hide "
                'GPUs that it shall not use (CUDA_VISIBLE_DEVICES=""), or start the trainer on that device'
            )

    def _prepare_model(self, model: nn.Module, *args, **kwargs) -> nn.Module:
        """Accelerator.prepare_model, which would wrap, or move whole, what it is given.

        A model beside the trained one, DPO's reference, is frozen and sharded alike.
        """
        if model is self.model or model is self._prepared:
            return self._shard_model()
        if find_engine(model) is not None:
            return model
        settings = dict(self._shard_settings.shard or {})
        offload = Offload.of(settings.get("offload"))
        if offload is not None and not offload.parameters:
            settings["offload"] = None  # a frozen model has nothing else to offload
        settings.setdefault("stage", self._shard_settings.partition_of(self.model).stage)
        precision = self._shard_settings.precision_of(self.args, self.model)
        zerolite.shard(model.requires_grad_(False), precision=precision, **settings)
        return self._prepare_whole(model, device_placement=False, evaluation_mode=True)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader=None) -> nn.Module:
        return self._shard_model()

    def _precompute_ref_logps(self, *args, **kwargs):
        """TRL's DPOTrainer, asked before training. Collective."""
        self._shard_model()
        return super()._precompute_ref_logps(*args, **kwargs)

    # Steps #

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        self._shard_model()
        optimizer = super().create_optimizer(*args, **kwargs)
        if not isinstance(optimizer, ShardedOptimizer):
            optimizer = zerolite.like(optimizer)
        optimizer._is_accelerate_prepared = True  # Accelerate's wrapper would move all states to the device
        self.optimizer = optimizer
        return optimizer

    def get_optimizer_cls_and_kwargs(self, args, model=None) -> tuple[type[ShardedOptimizer], dict[str, Any]]:
        return self._shard_settings.optimizer_of(args)

    def _clip_grad_norm(self, model: nn.Module) -> float:
        return self.optimizer.clip_grad_norm_(self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: float | None = None) -> float:
        return self.optimizer.clip_grad_norm_(float("inf")) if grad_norm is None else grad_norm

    # Files #

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write whole weights, configuration and tokenizer as Trainer does. Collective."""
        if find_engine(self.model) is None:
            super().save_model(output_dir, _internal_call)
            return
        folder = output_dir if output_dir is not None else self.args.output_dir
        write_model(self.model, Path(folder), functools.partial(self._save, folder))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Collective."""
        extra = {"scheduler": self.lr_scheduler.state_dict()}
        zerolite.save(
            self.model, Path(output_dir) / STATES, self.optimizer, extra=extra, frozen=not is_peft_model(self.model)
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Parameters come with the optimizer's states, once the model is sharded: `_load_optimizer_and_scheduler`."""
        if not (Path(resume_from_checkpoint) / STATES).is_dir():
            raise ValueError(
                f"{resume_from_checkpoint} holds no folder {STATES!r}: a trainer without zero=, or with "
                "save_only_model=True, wrote it, and there are no optimizer states to resume from. Build the model "
                "from it (from_pretrained), and train without resume_from_checkpoint"
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Parameters, optimizer states and the schedule. Collective."""
        if checkpoint is not None:
            extra = zerolite.load(self.model, Path(checkpoint) / STATES, self.optimizer)
            self.lr_scheduler.load_state_dict(extra["scheduler"])

    def _load_best_model(self) -> None:
        """Collective."""
        states = Path(self.state.best_model_checkpoint) / STATES
        if states.is_dir():
            zerolite.load(self.model, states)
            return
        with zerolite.full_params(self.model, writeback=True):  # save_only_model=True: whole weights alone
            super()._load_best_model()


class ZeroTrainer(ZeroMixin, Trainer):
    """transformers.Trainer on shards: `ZeroTrainer(model, args, zero=dict(stage=3, offload="cpu"), ...)`.

    Arguments as of Trainer, and `zero` as of `ZeroMixin`.
    """
