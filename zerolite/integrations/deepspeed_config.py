"""A DeepSpeed configuration read as zerolite's arguments: every key is used, not needed, or refused by name.

`zerolite.foreign` says what its keys mean. `read` knows nothing of a trainer: what the file says about the training
itself (rates, batches, clipping) it gives as values of transformers.TrainingArguments, for whoever compares them; a
value "auto" says nothing.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from zerolite.config import Offload, Precision
from zerolite.foreign import deepspeed
from zerolite.foreign.configuration import AUTO, IDLE, NONE, UNKNOWN, USED, Configuration, Key
from zerolite.shards.layout import Partition

# Refused where they are on: TrainingArguments say it instead.
_OF_ARGUMENTS = {
    "dataloader_drop_last": "TrainingArguments(dataloader_drop_last=True)",
    **dict.fromkeys(["tensorboard", "wandb", "csv_monitor", "comet"], "TrainingArguments(report_to=...)"),
}
# Without a counterpart, and not refused: transformers' own examples have them, and training is the same without.
_NOT_NEEDED = {
    "fp16.hysteresis": "the loss scale is halved at every overflow",
    "fp16.consecutive_hysteresis": "the loss scale is halved at every overflow",
    "activation_checkpointing": "models of transformers do not read it: TrainingArguments(gradient_checkpointing=True)",
}
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_SCHEDULES = ("constant_with_warmup", "linear")  # those that lr_scheduler_type alone says


@dataclass
class DeepSpeedConfig:
    """What a DeepSpeed configuration asks for, in zerolite's words."""

    stage: int = 0
    offload: Offload | None = None
    precisions: dict[str, Precision] = field(default_factory=dict)  # by mixed precision: "bf16", "fp16"
    optimizer: str | None = None  # the name of zerolite's class; None: the file names none
    betas: tuple[float, float] | None = None
    training: dict[str, Any] = field(default_factory=dict)  # TrainingArguments that the file tells, by name
    keys: dict[str, str] = field(default_factory=dict)  # every key of the file, dotted, and what became of it


def read(config: Mapping[str, Any] | str | os.PathLike) -> DeepSpeedConfig:
    """A DeepSpeed configuration: a dict, or the path of its JSON file.

    Raises ValueError for what is no JSON object, for values of no known kind, and one that lists every key that has no
    counterpart with the way out.
    """
    if not isinstance(config, Mapping):
        path = Path(config)
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, Mapping):
        raise ValueError(f"a DeepSpeed configuration is a JSON object, got {type(config).__name__}")
    return _Reading(config).result()


class _Reading:
    """One configuration while it is read: what nobody asks for is looked up, and refused if it asks for something."""

    def __init__(self, config: Mapping[str, Any]):
        self.config = Configuration(config)
        self.found = DeepSpeedConfig()
        self.absent: list[Key] = []  # keys that are refused for DeepSpeed's default

    def result(self) -> DeepSpeedConfig:
        self._read_offload()
        self._read_precision()
        self._read_optimizer()
        self._read_schedule()
        self._read_batches()
        self._read_the_trainers()
        keys = self.config.keys()
        without = {key.name.removesuffix("type") for key in keys if key.name.endswith(".type") and key.status == NONE}
        refused = [
            key
            for key in [*keys, *self.absent]
            if key.status in (NONE, UNKNOWN) and not key.name.startswith(tuple(f"{name}params." for name in without))
        ]
        if refused:
            raise ValueError(
                "zerolite has no counterpart of these keys of the DeepSpeed configuration:\n  "
                + "\n  ".join(f"{key.name}={json.dumps(key.value, default=str)}: {key.told}" for key in refused)
            )
        for name, value, status, told in keys:
            is_auto = status == USED and value == AUTO
            self.found.keys[name] = f'TrainingArguments: {told} ("auto")' if is_auto else f"{status}: {told}"
        return self.found

    def expect(self, key: str, name: str, value_of: Callable[[str], Any]) -> None:
        """The file tells a value of TrainingArguments."""
        self.config.use(key, name)
        if self.config.get(key) not in (None, AUTO):
            self.found.training[name] = value_of(key)

    def _read_offload(self) -> None:
        config, found = self.config, self.found
        found.stage = deepspeed.stage(config)
        given = deepspeed.offload(config, Partition(found.stage).shards_parameters)
        section = f"{deepspeed.SECTION}.offload"
        if given.optimizer == "none":
            if given.parameters != "none":
                way_out = "parameters leave with their optimizer states: set offload_optimizer.device, too"
                config.tell(f"{section}_param.device", NONE, way_out)
        elif given.optimizer == "nvme" and given.path is None:
            config.tell(f"{section}_optimizer.device", NONE, "name its nvme_path")
        is_offloaded = given.optimizer != "none"
        halves = [
            deepspeed.has_16_bit_states(config, "bf16.bf16_optimizer_states", is_offloaded),
            deepspeed.has_16_bit_states(config, "optimizer.params.fp32_optimizer_states", is_offloaded, when=False),
        ]
        if is_offloaded:
            states = "bf16" if any(halves) else "fp32"
            found.offload = Offload(parameters=given.parameters != "none", states=states, path=given.path)

    def _read_precision(self) -> None:
        reduce = deepspeed.reduction(self.config)
        power, window = deepspeed.loss_scale(self.config)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**power, growth_interval=window)
        for name in ("bf16", "fp16"):
            self.expect(f"{deepspeed.section_of(self.config, name)}.enabled", name, self.config.is_on)
            # DeepSpeed reduces in the dtype that it computes in.
            self.found.precisions[name] = Precision(
                _DTYPES[name], _DTYPES[reduce or name], scaler if name == "fp16" else None
            )

    def _read_optimizer(self) -> None:
        self.found.optimizer = deepspeed.optimizer(self.config)
        if "optimizer.type" not in self.config.leaves:
            return
        self.expect("optimizer.params.lr", "learning_rate", self.config.number)
        self.expect("optimizer.params.weight_decay", "weight_decay", self.config.number)
        if self.found.optimizer != "Lion":
            self.expect("optimizer.params.eps", "adam_epsilon", self.config.number)
        betas = self.config.get("optimizer.params.betas")
        self.config.use("optimizer.params.betas", "adam_beta1 and adam_beta2")
        if betas is not None and betas != AUTO:
            self.found.betas = (float(betas[0]), float(betas[1]))
            self.found.training.update(adam_beta1=self.found.betas[0], adam_beta2=self.found.betas[1])

    def _read_schedule(self) -> None:
        config, name = self.config, deepspeed.schedule(self.config)
        if name is None:
            return
        if name not in _SCHEDULES:
            way_out = "remove the scheduler, and set TrainingArguments(lr_scheduler_type=...)"
            config.tell("scheduler.type", NONE, way_out)
        if not deepspeed.is_warmup_linear(config):
            key = "scheduler.params.warmup_type"
            way_out = (
                f"transformers warms up linearly: remove the scheduler and set TrainingArguments(lr_scheduler_type="
                f'"{name}", warmup_steps=...), or say "linear" here (DeepSpeed\'s default is "log")'
            )
            config.tell(key, NONE, way_out)
            if key not in config.leaves:
                self.absent.append(Key(key, "log", NONE, way_out))
        self.found.training["lr_scheduler_type"] = name
        self.expect("scheduler.params.warmup_max_lr", "learning_rate", self.config.number)
        self.expect("scheduler.params.warmup_num_steps", "warmup_steps", self.config.count)
        self.expect("scheduler.params.total_num_steps", "max_steps", self.config.count)

    def _read_batches(self) -> None:
        self.expect("train_micro_batch_size_per_gpu", "per_device_train_batch_size", self.config.count)
        self.expect("gradient_accumulation_steps", "gradient_accumulation_steps", self.config.count)
        self.expect("train_batch_size", "train_batch_size", self.config.count)
        if "gradient_clipping" in self.config.leaves:
            self.expect("gradient_clipping", "max_grad_norm", self.config.number)
        else:
            self.found.training["max_grad_norm"] = deepspeed.CLIPPING

    def _read_the_trainers(self) -> None:
        """Keys that mean something else in a Trainer than in a loop of one's own."""
        for key in self.config.leaves:
            section = key.split(".")[0]
            if why := _NOT_NEEDED.get(key, _NOT_NEEDED.get(section)):
                self.config.tell(key, IDLE, why)
            elif way_out := _OF_ARGUMENTS.get(section):
                why = self.config.why_idle(key)
                self.config.tell(key, IDLE if why else NONE, why or way_out)
