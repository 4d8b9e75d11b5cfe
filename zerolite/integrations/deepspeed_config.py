"""A DeepSpeed configuration read as zerolite's arguments: every key is used, not needed, or refused by name.

`read` knows nothing of a trainer. What the file says about the training itself (rates, batches, clipping) it gives as
values of transformers.TrainingArguments, for whoever compares them; a value "auto" says nothing.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from zerolite.config import Offload, Precision
from zerolite.shards.layout import Partition

AUTO = "auto"

_SECTION = "zero_optimization."
_TUNING = "zerolite chooses it"
_NOT_NEEDED = {
    **dict.fromkeys(
        [
            *(_SECTION + name for name in (
                "allgather_bucket_size", "allgather_partitions", "contiguous_gradients", "overlap_comm",
                "reduce_bucket_size", "reduce_scatter", "round_robin_gradients", "sub_group_size",
                "use_multi_rank_bucket_allreduce", "stage3_max_live_parameters", "stage3_max_reuse_distance",
                "stage3_model_persistence_threshold", "stage3_module_granularity_threshold",
                "stage3_param_persistence_threshold", "stage3_prefetch_bucket_size",
                "stage3_use_all_reduce_for_fetch_params", "memory_efficient_linear", "log_trace_cache_warnings",
            )),
            *(f"{_SECTION}offload_{kind}.{name}" for kind in ("optimizer", "param") for name in (
                "pin_memory", "buffer_count", "buffer_size", "fast_init", "pipeline", "pipeline_read",
                "pipeline_write", "max_in_cpu", "cpuadam_cores_perc",
            )),
            _SECTION + "cpu_offload_use_pin_memory", "aio", "gradient_predivide_factor", "prescale_gradients",
            "disable_allgather",
        ],
        _TUNING,
    ),
    **dict.fromkeys(
        [
            *(_SECTION + name for name in (
                "stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save",
                "load_from_fp32_weights", "elastic_checkpoint", "legacy_stage1", "pipeline_loading_checkpoint",
            )),
            "checkpoint",
        ],
        "save_model always writes whole weights, and a checkpoint loads at any stage and world size",
    ),
    _SECTION + "ignore_unused_parameters": "parameters without a gradient are left alone at every stage",
    _SECTION + "override_module_apply": "there is no zero.Init: load_pretrained reads straight into shards",
    "zero_allow_untested_optimizer": "optimizers are zerolite's",
    "zero_force_ds_cpu_optimizer": "optimizers are zerolite's",
    "fp16.hysteresis": "the loss scale is halved at every overflow",
    "fp16.auto_cast": "inputs are cast to the parameters' dtype",
    "activation_checkpointing": "models of transformers do not read it: TrainingArguments(gradient_checkpointing=True)",
    "optimizer.params.torch_adam": "one AdamW serves device and host",
    **dict.fromkeys(["steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state"], "it only prints"),
}  # fmt: skip

# Refused where they are on.
_REFUSED = {
    _SECTION + "zero_hpz_partition_size": 'a 2-D mesh replicates shards: zero=dict(mesh=...); or set it to 1',
    _SECTION + "mics_shard_size": "a 2-D mesh replicates shards: zero=dict(mesh=...); or set it to -1",
    _SECTION + "mics_hierarchical_params_gather": "set it to false",
    **dict.fromkeys(
        [_SECTION + name for name in ("zero_quantized_weights", "zero_quantized_nontrainable_weights",
                                   "zero_quantized_gradients")],
        "collectives are not quantised: set it to false",
    ),
    _SECTION + "zenflow": "remove it",
    _SECTION + "offload_optimizer.super_offload": "set it to false",
    "amp": "apex is not used: enable bf16 or fp16",
    "sparse_gradients": "set it to false, and build embeddings with sparse=False",
    "dataloader_drop_last": "TrainingArguments(dataloader_drop_last=True)",
    **dict.fromkeys(["tensorboard", "wandb", "csv_monitor", "comet"], "TrainingArguments(report_to=...)"),
    **dict.fromkeys(["flops_profiler", "comms_logger"], "torch.profiler; remove it"),
    **dict.fromkeys(
        ["autotuning", "compression_training", "curriculum_learning", "data_efficiency", "data_types", "eigenvalue",
         "elasticity", "hybrid_engine", "pipeline", "progressive_layer_drop", "quantize_training", "sparse_attention",
         "tensor_parallel", "sequence_parallel_size"],
        "remove it",
    ),
}  # fmt: skip
_OFF = {_SECTION + "zero_hpz_partition_size": 1, _SECTION + "mics_shard_size": -1}

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "bfp16": torch.bfloat16}
_OPTIMIZERS = ("Adam", "AdamW", "Lamb", "Lion")
_SCHEDULERS = {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear"}


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

    Raises ValueError for what is no JSON object, and one that lists every key that has no counterpart with the way out.
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
    """One configuration while it is read: what is not asked for remains, and is refused."""

    def __init__(self, config: Mapping[str, Any]):
        self.values = dict(_flat(config))
        self.found = DeepSpeedConfig()
        self.refused: list[str] = []

    def result(self) -> DeepSpeedConfig:
        self._read_stage()
        self._read_precision()
        self._read_optimizer()
        self._read_scheduler()
        self._read_batches()
        for key in list(self.values):
            self._account(key)
        if self.refused:
            raise ValueError(
                "zerolite has no counterpart of these keys of the DeepSpeed configuration:\n  "
                + "\n  ".join(self.refused)
            )
        return self.found

    def use(self, key: str, became: str, default: Any = None) -> Any:
        """The value of a key that is used; `became` says for what."""
        if key not in self.values:
            return default
        value = self.values.pop(key)
        self.found.keys[key] = f'TrainingArguments: {became} ("auto")' if value == AUTO else f"used: {became}"
        return default if value is None else value

    def refuse(self, key: str, value: Any, way_out: str, section: str | None = None) -> None:
        """section: the keys that go with it, which need no word of their own."""
        self.refused.append(f"{key}={json.dumps(value, default=str)}: {way_out}")
        if section is not None:
            self.values = {name: value for name, value in self.values.items() if not name.startswith(section)}

    def expect(self, key: str, name: str, convert: Callable[[Any], Any]) -> None:
        """The file tells a value of TrainingArguments."""
        value = self.use(key, name)
        if value is not None and value != AUTO:
            self.found.training[name] = convert(value)

    def _account(self, key: str) -> None:
        """A key that nobody asked for."""
        value = self.values[key]
        if value == {}:
            self.found.keys[key] = "not needed: it is empty"
            return
        for known, why in _NOT_NEEDED.items():
            if key == known or key.startswith(known + "."):
                self.found.keys[key] = f"not needed: {why}"
                return
        for known, way_out in _REFUSED.items():
            if key == known or key.startswith(known + "."):
                if self._is_on(known):
                    self.refuse(key, value, way_out)
                else:
                    self.found.keys[key] = "not needed: it is off"
                return
        self.refuse(key, value, "zerolite does not know this key; remove it")

    def _is_on(self, known: str) -> bool:
        if known in self.values:
            value = self.values[known]
            return bool(value) and value not in (AUTO, _OFF.get(known, False))
        return bool(self.values.get(f"{known}.enabled", True))

    def _read_stage(self) -> None:
        found = self.found
        found.stage = int(self.use(_SECTION + "stage", "stage", 0))
        device = self.use(_SECTION + "offload_optimizer.device", "offload", "none")
        path = self.use(_SECTION + "offload_optimizer.nvme_path", "Offload(path=...)")
        if self.use(_SECTION + "cpu_offload", "offload", False):
            device = "cpu"
        parameters = self.use(_SECTION + "offload_param.device", "Offload(parameters=True)", "none")
        if self.use(_SECTION + "cpu_offload_params", "Offload(parameters=True)", False):
            parameters = "cpu"
        self.use(_SECTION + "offload_param.nvme_path", "nothing, unless offload_param.device is nvme")
        ratio = self.use(_SECTION + "offload_optimizer.ratio", "offload", 1.0)
        if ratio != 1.0:
            way_out = 'say how much may stay on the device: zero=dict(offload=zerolite.Offload(budget="20GiB"))'
            self.refuse(_SECTION + "offload_optimizer.ratio", ratio, way_out)
        if parameters == "nvme":
            self.refuse(_SECTION + "offload_param.device", parameters, 'parameters can leave for the host: "cpu"')
        elif parameters not in (None, "none") and device in (None, "none"):
            way_out = "parameters leave with their optimizer states: set offload_optimizer.device, too"
            self.refuse(_SECTION + "offload_param.device", parameters, way_out)
        elif parameters not in (None, "none") and not Partition(found.stage).shards_parameters:
            self.refuse(_SECTION + "offload_param.device", parameters, 'parameters leave the device at "stage": 3')
        elif device not in (None, "none"):
            if device == "nvme" and path is None:
                self.refuse(_SECTION + "offload_optimizer.device", device, "name its nvme_path")
            found.offload = Offload(
                parameters=parameters not in (None, "none"), path=str(path) if device == "nvme" and path else None
            )

    def _read_precision(self) -> None:
        reduce = self.use("communication_data_type", "Precision(reduce=...)")
        if reduce is not None and reduce not in _DTYPES:
            self.refuse("communication_data_type", reduce, f"one of {', '.join(_DTYPES)}")
        scaler = self._scaler()
        for name, param in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
            for section in (name, "bfloat16") if name == "bf16" else (name,):
                enabled = self.use(f"{section}.enabled", name)
                if enabled is not None and enabled != AUTO:
                    self.found.training[name] = bool(enabled)
            # DeepSpeed reduces in the dtype that it computes in.
            self.found.precisions[name] = Precision(
                param, _DTYPES.get(reduce, param) if reduce is not None else param, scaler if name == "fp16" else None
            )

    def _scaler(self) -> torch.amp.GradScaler:
        scale = self.use("fp16.loss_scale", "dynamic loss scaling", 0)
        if scale not in (0, AUTO):
            self.refuse("fp16.loss_scale", scale, "the loss scale is dynamic: 0")
        lowest = self.use("fp16.min_loss_scale", "the lowest loss scale", 1)
        if lowest not in (1, AUTO):
            self.refuse("fp16.min_loss_scale", lowest, "the lowest loss scale is 1")
        power = self.use("fp16.initial_scale_power", "Precision(scaler=...)", 16)
        window = self.use("fp16.loss_scale_window", "Precision(scaler=...)", 1000)
        return torch.amp.GradScaler(
            "cpu",
            init_scale=2.0 ** (16 if power == AUTO else power),
            growth_interval=1000 if window == AUTO else window,
        )

    def _read_optimizer(self) -> None:
        kind = self.use("optimizer.type", "the optimizer")
        if kind is None:
            return
        name = {one.lower(): one for one in _OPTIMIZERS}.get(str(kind).lower())
        if name is None:
            self.refuse("optimizer.type", kind, f"one of {', '.join(_OPTIMIZERS)}", "optimizer.")
            return
        decouples = self.use("optimizer.params.adam_w_mode", "Adam or AdamW", True)
        if name == "Adam" and decouples:
            name = "AdamW"  # DeepSpeed's Adam decouples the decay unless it is told not to
            self.found.keys["optimizer.type"] = "used: zerolite.AdamW, which DeepSpeed's Adam is by default"
        self.found.optimizer = name
        self.expect("optimizer.params.lr", "learning_rate", float)
        self.expect("optimizer.params.eps", "adam_epsilon", float)
        self.expect("optimizer.params.weight_decay", "weight_decay", float)
        betas = self.use("optimizer.params.betas", "adam_beta1 and adam_beta2")
        if betas is not None and betas != AUTO:
            self.found.betas = (float(betas[0]), float(betas[1]))
            self.found.training.update(adam_beta1=self.found.betas[0], adam_beta2=self.found.betas[1])

    def _read_scheduler(self) -> None:
        kind = self.use("scheduler.type", "lr_scheduler_type")
        if kind is None:
            return
        if kind not in _SCHEDULERS:
            way_out = "remove the scheduler, and set TrainingArguments(lr_scheduler_type=...)"
            self.refuse("scheduler.type", kind, way_out, "scheduler.")
            return
        shape = self.use("scheduler.params.warmup_type", "a linear warm-up", "log")
        if shape != "linear":
            way_out = (
                f"transformers warms up linearly: remove the scheduler and set TrainingArguments(lr_scheduler_type="
                f'"{_SCHEDULERS[kind]}", warmup_steps=...), or say "linear" here (DeepSpeed\'s default is "log")'
            )
            self.refuse("scheduler.params.warmup_type", shape, way_out)
        lowest = self.use("scheduler.params.warmup_min_lr", "the rate that warm-up begins with", 0)
        if lowest not in (0, AUTO):
            self.refuse("scheduler.params.warmup_min_lr", lowest, "warm-up begins with a rate of 0")
        self.found.training["lr_scheduler_type"] = _SCHEDULERS[kind]
        self.expect("scheduler.params.warmup_max_lr", "learning_rate", float)
        self.expect("scheduler.params.warmup_num_steps", "warmup_steps", int)
        self.expect("scheduler.params.total_num_steps", "max_steps", int)

    def _read_batches(self) -> None:
        self.expect("train_micro_batch_size_per_gpu", "per_device_train_batch_size", int)
        self.expect("gradient_accumulation_steps", "gradient_accumulation_steps", int)
        self.expect("train_batch_size", "train_batch_size", int)
        if "gradient_clipping" in self.values:
            self.expect("gradient_clipping", "max_grad_norm", float)
        else:
            self.found.training["max_grad_norm"] = 0.0  # DeepSpeed clips where it is told to


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value with its dotted key; an empty section is a value."""
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
