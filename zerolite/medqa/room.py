"""What a run will need, by formula, beside what is free: device and host memory, and the disk of its output folder.

Refused is what cannot fit: model states alone, without activations. What fits narrowly may still run out of memory.
"""

import dataclasses
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import nn
from transformers import PretrainedConfig

from zerolite import adapters
from zerolite.medqa import model as models
from zerolite.medqa.arguments import Options
from zerolite.medqa.processes import Processes
from zerolite.medqa.tuning import PARAMETER_BYTES

# Bytes a parameter. States are one or two moments; 16-bit parameters add an fp32 master copy, of which the host keeps
# only the half that a bf16 parameter has not.
NUM_MOMENTS = {"adamw": 2, "adam": 2, "lamb": 2, "lion": 1}
MASTER_BYTES = {"fp32": 0, "bf16": 4, "fp16": 4}
HOST_MASTER_BYTES = {"fp32": 0, "bf16": 2, "fp16": 4}
MOMENT_BYTES = {"fp32": 4, "bf16": 2, "int8": 1 + 4 / 128}
GRADIENT_BYTES = 4  # reduced and kept in fp32, at every precision
STAYS_WHOLE = 4  # no stage shards it
GROUP = Path("/sys/fs/cgroup")  # of this container, version 2

Term = tuple[float, int, str]  # bytes a parameter, the stage from which ranks share them, Φ (trained) or F (frozen)
ON_DEVICE = ("parameters", "gradients", "optimizer states")
ON_HOST, ON_DRIVE = "in host memory", "on the drive"

# What else a user could choose, the cheaper in time first.
WAYS: tuple[dict, ...] = (
    {"stage": 2},
    {"stage": 3},
    {"offload": "cpu"},
    {"stage": 3, "offload": "cpu"},
    {"stage": 3, "offload": "cpu", "offload_parameters": True},
    {"finetuning_type": "lora"},
    {"finetuning_type": "lora", "stage": 3},
)
SWITCHED = {"offload_budget": None, "offload_path": None, "offload_parameters": False}


def model_states(options: Options, has_frozen: bool) -> dict[str, list[Term]]:
    """Terms of a rank's model states by where they lie, where nothing or everything is offloaded."""
    parameter, master = PARAMETER_BYTES[options.precision], MASTER_BYTES[options.precision]
    moments = NUM_MOMENTS[options.optim] * MOMENT_BYTES[options.offload_states]
    frozen: list[Term] = [(parameter, 3, "F")] if has_frozen else []
    trained: Term = (parameter, STAYS_WHOLE if options.is_adapter else 3, "Φ")  # adapters are never sharded
    if options.offload == "none":
        states: list[list[Term]] = [[trained, *frozen], [(GRADIENT_BYTES, 2, "Φ")], [(master + moments, 1, "Φ")]]
        return dict(zip(ON_DEVICE, states, strict=True))
    streamed = options.offload_parameters
    on_device = [trained] if options.is_adapter else []
    width = parameter + HOST_MASTER_BYTES[options.precision] + GRADIENT_BYTES
    on_host: list[Term] = [(width if options.offload_path else width + moments, 1, "Φ")]
    found = {"parameters": on_device if streamed else [trained, *frozen], "gradients": [], "optimizer states": []}
    found[ON_HOST] = on_host + (frozen if streamed else [])
    if options.offload_path is not None:
        found[ON_DRIVE] = [(moments, 1, "Φ")]
    return found


def bytes_of(terms: list[Term], stage: int, num_trained: int, num_frozen: int, world_size: int) -> float:
    numel = {"Φ": num_trained, "F": num_frozen}
    return sum(width * numel[symbol] / (world_size if stage >= first else 1) for width, first, symbol in terms)


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes of model states on each rank."""

    device: float
    host: float
    drive: float


def needed(options: Options, num_trained: int, num_frozen: int, world_size: int) -> Need:
    """By formula, padding left out; with a budget, which moves some of it to the device, at least so much there."""
    sizes = (options.stage, num_trained, num_frozen, world_size)
    found = {name: bytes_of(terms, *sizes) for name, terms in model_states(options, num_frozen > 0).items()}
    on_device = sum(found[name] for name in ON_DEVICE)
    if options.offload_budget is not None:
        return Need(on_device, 0.0, 0.0)
    return Need(on_device, found.get(ON_HOST, 0.0), found.get(ON_DRIVE, 0.0))


def count(options: Options, config: PretrainedConfig, adapt: Callable[[nn.Module], object] | None) -> tuple[int, int]:
    """Elements of parameters that train and that do not, of a model that takes no memory.

    Raises ValueError for a model that cannot be built, and for an adapter that could not be merged where it is to be.
    """
    whole = models.on_meta(options, config)
    if adapt is not None:
        adapt(whole)
        if options.export_merged:
            adapters.check_merge(whole)
    numel = {True: 0, False: 0}
    for parameter in whole.parameters():
        numel[parameter.requires_grad] += parameter.numel()
    return numel[True], numel[False]


def check(
    options: Options,
    config: PretrainedConfig,
    adapt: Callable[[nn.Module], object] | None,
    ranks: Processes,
    num_steps: int,
) -> str:
    """See that the run fits; what it needs beside what is free, for people. Every rank must call it.

    Raises ValueError, the same on every rank, where model states do not fit into memory, or the result and one
    checkpoint not on the disk: with what is needed, what is free, and which options would fit.
    """
    num_trained, num_frozen = count(options, config, adapt)
    sizes = (num_trained, num_frozen, ranks.world_size)
    checkpoint, result = disk_bytes(options, num_trained, num_frozen)
    rows = ranks.gather(*free_bytes(options, ranks.device))
    device, host, drive = (min(column) for column in list(zip(*rows, strict=True))[:3])
    disk = rows[0][3]  # rank 0 writes, where it is seen
    need = needed(options, *sizes)
    if lacking := _lacking(need, device, host, drive):
        raise ValueError(f"{lacking}; {_ways(options, sizes, device, host)}")
    num_checkpoints = num_steps // options.save_steps + (not options.export)
    kept = options.save_total_limit or num_checkpoints
    least = checkpoint * min(1, num_checkpoints) + (result if options.export else 0)
    most = checkpoint * min(kept, num_checkpoints) + (result if options.export else 0)
    if least > disk:
        raise ValueError(
            f"--output_dir {options.output_dir}: the result and one checkpoint take {_text(least)}, {_text(disk)} are "
            "free there: make room, or name a folder on another disk"
        )
    line = f"needed: {_text(need.device)} of {_text(device)} free for model states on each rank's {ranks.device.type}"
    if need.host:
        line += f", {_text(need.host)} of {_text(host)} in host memory"
    if need.drive:
        line += f", {_text(need.drive)} of {_text(drive)} on the drive"
    line += f"; {_text(most)} of {_text(disk)} on the disk of {options.output_dir}"
    if most > disk:
        line += (
            f": too much for {num_checkpoints} checkpoints of {_text(checkpoint)}, so the disk will be full before the "
            "end: save less often (--save_steps), or remove old ones in time"
        )
    return line


def disk_bytes(options: Options, num_trained: int, num_frozen: int) -> tuple[int, int]:
    """(a checkpoint, the result): fp32 parameters and moments of what trains; parameters in their dtype."""
    width = PARAMETER_BYTES[options.precision]
    checkpoint = num_trained * (4 + 4 * NUM_MOMENTS[options.optim])
    if not options.is_adapter:
        return checkpoint, (num_trained + num_frozen) * width
    return checkpoint, (num_trained + (num_frozen if options.export_merged else 0)) * width


def free_bytes(options: Options, device: torch.device) -> tuple[float, float, float, float]:
    """Free bytes for this rank: of its device, its share of the host's, of the offload drive's, and of the disk."""
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    host = host_bytes() / num_local
    drive = shutil.disk_usage(options.offload_path).free / num_local if options.offload_path else math.inf
    on_device = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host
    return on_device, host, drive, shutil.disk_usage(options.output_dir).free


def host_bytes() -> int:
    """Memory that processes of this machine, or of its container, can still take, swap included."""
    free = psutil.virtual_memory().available
    try:
        limit, used = (int((GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        cached = dict(line.split() for line in (GROUP / "memory.stat").read_text().splitlines())["inactive_file"]
        free = min(free, limit - used + int(cached))
    except (OSError, ValueError, KeyError):  # "max", or no such group: the machine's
        pass
    return free + psutil.swap_memory().free


def _lacking(need: Need, device: float, host: float, drive: float) -> str | None:
    """What does not fit; None where all does."""
    if device == host:  # the CPU is the device
        need, host = Need(need.device + need.host, 0, need.drive), math.inf
    for where, wanted, free in (
        ("the memory of its device", need.device, device),
        ("its share of host memory", need.host, host),
        ("its share of --offload_path", need.drive, drive),
    ):
        if wanted > free:
            return (
                f"model states of a rank take {_text(wanted)} and {_text(free)} of {where} are free, before any "
                "activation"
            )
    return None


def _ways(options: Options, sizes: tuple[int, int, int], device: float, host: float) -> str:
    """Which options would fit."""
    fitting = []
    num_trained, num_frozen, world_size = sizes
    for way in WAYS:
        if options.model_name_or_path is None and "finetuning_type" in way:
            continue
        numel = (0, num_trained + num_frozen) if "finetuning_type" in way else (num_trained, num_frozen)
        need = needed(dataclasses.replace(options, **{**SWITCHED, **way}), *numel, world_size)
        changes = any(getattr(options, name) != value for name, value in way.items())
        if changes and _lacking(need, device, host, math.inf) is None:
            fitting.append(" ".join(f"--{name}" + f" {value}" * (value is not True) for name, value in way.items()))
    if not fitting:
        return "no --stage, --offload or LoRA makes it fit: take more devices, or a smaller model"
    return f"this would fit: {', or '.join(fitting[:3])}"


def _text(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB" if num_bytes < 2**30 else f"{num_bytes / 2**30:,.1f} GiB"
