"""`zerolite.plan`: what a run will take on each device and host, and what it will send, before it runs.

Three parts make a plan: a `Profile` of the model's own code on fake tensors (activations.py), a `DryEngine`, which is
the engine on tensors without memory (dry_engine.py), and a `Walk` of the second along the first (walk.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from zerolite.config import Offload, Precision
from zerolite.engine.build import check_arguments
from zerolite.memory import activations
from zerolite.memory.dry_engine import Traffic, dry_engine
from zerolite.memory.rates import Rates
from zerolite.memory.subject import Inputs, Subject
from zerolite.memory.times import StepTime, Work, completed, step_time
from zerolite.memory.walk import Peak, Walk
from zerolite.offload.placement import Policy
from zerolite.optim.adam import Adam
from zerolite.optim.adamw import AdamW
from zerolite.optim.base import ShardedOptimizer
from zerolite.optim.lamb import Lamb
from zerolite.optim.lion import Lion
from zerolite.runtime.device import Cuda
from zerolite.shards.layout import Partition
from zerolite.shards.units import UnitRule

GIB = 2**30
OPTIMIZERS: dict[str, type[ShardedOptimizer]] = {"adamw": AdamW, "adam": Adam, "lamb": Lamb, "lion": Lion}


@dataclass(frozen=True)
class Target:
    """What differs between devices in a plan."""

    is_host: bool  # the device's memory is the host's
    receives_apart: bool  # a reduction receives into memory of its own
    scratch_numel: int  # elements that a step works on at once beside its operands
    overhead_bytes: int  # of a process on its device, before any tensor
    process_bytes: int  # of a trainer in host memory, its arena left out
    assumption: str


# Host memory of a process after `import zerolite, transformers`, and of a worker: PSS, measured 2026-11-26 on this
# project's 2-core machine with torch 2.13 for the CPU. The device's share of a CUDA context was not measured here.
WORKER_BYTES = 12 * 2**20
TARGETS = {
    "cuda": Target(
        False, False, Cuda.chunk_numel, 3 * GIB // 4, 5 * GIB // 4,
        "a CUDA context with its kernels and NCCL takes 0.75 GiB of the card and 1.25 GiB of the host (assumed)",
    ),
    "cpu": Target(True, True, 0, 0, 320 * 2**20, "a process takes 0.3 GiB of the host (measured with torch 2.13)"),
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What a run takes. Bytes are of one rank where nothing else is said; every rank takes as much.

    `str(plan)` is a table, `plan.as_dict()` has every number.
    """

    model: str
    stage: int
    num_shards: int  # ranks that shard
    num_replicas: int
    offload: Offload | None
    num_parameters: int
    num_trainable: int
    states: dict[str, int]  # on the device, by kind, at the end of backward; padding included
    peaks: dict[str, Peak]  # on the device, of "forward", "backward" and "step"
    host: dict[str, int]  # in the arena, by kind
    arena_bytes: int
    pinned_bytes: int
    file_bytes: int
    overhead_bytes: int  # on the device, of the process
    host_bytes: int  # of one host: arenas and processes of its ranks, workers included; on the CPU their peaks, too
    traffic: Traffic  # of one step
    flops: int  # of one step's forward and backward
    time: StepTime
    assumptions: tuple[str, ...]

    @property
    def states_bytes(self) -> int:
        """Model states on the device at the end of backward: what `zerolite.measure` counts there."""
        return sum(self.states.values())

    @property
    def peak_bytes(self) -> int:
        """The most that lives at once on the device, the process's overhead included."""
        return max(peak.total_bytes for peak in self.peaks.values()) + self.overhead_bytes

    @property
    def world_size(self) -> int:
        return self.num_shards * self.num_replicas

    def fits(self, device_bytes: int | None, host_bytes: int | None = None) -> bool:
        """Whether it fits a device, and a host, of so many bytes; None: that is not asked."""
        return not self.lacks(device_bytes, host_bytes)

    def lacks(self, device_bytes: int | None, host_bytes: int | None = None) -> dict[str, int]:
        """Bytes that are missing, on "device" and "host"; empty where it fits."""
        asked = {"device": (self.peak_bytes, device_bytes), "host": (self.host_bytes, host_bytes)}
        return {where: needed - has for where, (needed, has) in asked.items() if has is not None and needed > has}

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and texts, for JSON; bytes, seconds."""
        offload = None if self.offload is None else vars(self.offload)
        peaks = {phase: {"total": peak.total_bytes, **peak.bytes_of} for phase, peak in self.peaks.items()}
        own = {
            name: value for name, value in vars(self).items() if isinstance(value, int | str | dict) and name != "peaks"
        }
        return {
            **own,
            "offload": offload,
            "peaks": peaks,
            "states_bytes": self.states_bytes,
            "peak_bytes": self.peak_bytes,
            "world_size": self.world_size,
            "traffic": vars(self.traffic)
            | {"sent_bytes": self.traffic.sent_bytes, "bus_bytes": self.traffic.bus_bytes},
            "time": vars(self.time),
            "assumptions": list(self.assumptions),
        }

    def __str__(self) -> str:
        ranks = f"{self.num_replicas} x {self.num_shards}" if self.num_replicas > 1 else f"{self.num_shards}"
        lines = [f"{self.model}, {self.num_parameters:,} parameters ({self.num_trainable:,} train), stage {self.stage}"]
        lines[0] += f", {ranks} rank{'s' * (self.world_size > 1)}"
        kinds = [kind for kind in next(iter(self.peaks.values())).bytes_of if self._most(kind) > 0]
        lines.append(f"{'GiB on each device':20}" + "".join(f"{phase:>10}" for phase in self.peaks))
        for kind in kinds:
            lines.append(f"  {kind:18}" + "".join(f"{p.bytes_of[kind] / GIB:10.2f}" for p in self.peaks.values()))
        if self.overhead_bytes:
            lines.append(f"  {'process':18}" + f"{self.overhead_bytes / GIB:10.2f}" * len(self.peaks))
        totals = [peak.total_bytes + self.overhead_bytes for peak in self.peaks.values()]
        lines.append(f"  {'together':18}" + "".join(f"{total / GIB:10.2f}" for total in totals))
        lines.append(
            f"host {self.host_bytes / GIB:.2f} GiB, {self.arena_bytes / GIB:.2f} GiB a rank offloaded, "
            f"{self.pinned_bytes / GIB:.2f} GiB of it pinned"
        )
        sent, bus = self.traffic.sent_bytes, self.traffic.bus_bytes
        lines.append(f"a step sends {sent / GIB:.2f} GiB a rank to others, {bus / GIB:.2f} GiB over the bus")
        lines.append(f"about {self.time.total_seconds:.3g} s a step; assumed: " + "; ".join(self.assumptions))
        return "\n".join(lines)

    def _most(self, kind: str) -> int:
        return max(peak.bytes_of.get(kind, 0) for peak in self.peaks.values())


def plan(
    model: nn.Module | str | Path,
    stage: int,
    world_size: int | tuple[int, int] = 1,
    offload: Offload | str | None = None,
    precision: Precision | None = None,
    units: UnitRule | None = None,
    *,
    optimizer: str | type[ShardedOptimizer] = "AdamW",
    adapt: Callable[[nn.Module], object] | None = None,
    batch: int | None = 1,
    length: int = 2048,
    checkpointing: bool | None = None,
    chunked_loss: bool = False,
    step: activations.Step | None = None,
    accumulation: int = 1,
    no_sync: bool = False,
    device: str = "cuda",
    ranks_per_host: int = 8,
    rates: Rates | None = None,
) -> Plan:
    """What training a model will take: bytes by kind on each device and host, what a step sends, and seconds.

    No memory is taken, nothing runs on a device, and no other rank is asked.

    model: a model, which stays as it is; a preset ("llama-7b", ...: `zerolite.memory.presets.PRESETS`), or a folder
        with a config.json of Hugging Face.
    stage, offload, precision, units: as `zerolite.shard` takes them; None for precision leaves the model's dtypes,
        which are bf16 for a preset.
    world_size: ranks that shard, or (replicas, shards) of a 2-D mesh.
    optimizer: one of zerolite's, by name or class. adapt: called with a preset's model, as of `load_pretrained`: adds
        an adapter and freezes the rest.
    batch, length: rows of one rank's micro-batch, and tokens of a row, every one with a label. batch=None: model
        states alone, without activations.
    checkpointing: recompute blocks in backward; None: as the model is set. chunked_loss: logits are never whole.
    step: for other models, one forward with inputs that it makes, returning the loss; in place of batch and length.
    accumulation: micro-batches a step. no_sync: all but the last run inside `zerolite.no_sync`, which costs a whole
        gradient; else each is reduced.
    device: "cuda" or "cpu", what a process takes there and how it communicates. ranks_per_host: processes of one host.
    rates: what the time is computed from; None: assumed ones, which the plan tells.

    Activations are counted by running the model's own code on fake tensors with attention as torch has it on the CPU
    (fused, as a GPU's; with dropout in attention torch's unfused one), on rows without padding. Not counted: what a
    kernel or cuBLAS takes inside, and fragmentation of an allocator.
    Raises ValueError and TypeError as `zerolite.shard`, and for a model that is sharded, unknown, of DTensors, or
    cannot be run so.
    """
    if batch is not None and not (isinstance(batch, int) and batch >= 1):
        raise ValueError(f"batch= is a number of rows of at least 1, or None for model states alone; got {batch!r}")
    subject = Subject(model, adapt, units, step)
    inputs = Inputs(batch, length, checkpointing, chunked_loss)
    return plan_of(
        subject,
        stage,
        world_size,
        offload,
        precision,
        optimizer=optimizer,
        inputs=inputs,
        accumulation=accumulation,
        no_sync=no_sync,
        device=device,
        ranks_per_host=ranks_per_host,
        rates=rates,
    )


def plan_of(
    subject: Subject,
    stage: int,
    world_size: int | tuple[int, int],
    offload: Offload | str | None,
    precision: Precision | None,
    *,
    optimizer: str | type[ShardedOptimizer] = "AdamW",
    inputs: Inputs,
    accumulation: int = 1,
    no_sync: bool = False,
    device: str = "cuda",
    ranks_per_host: int = 8,
    rates: Rates | None = None,
) -> Plan:
    """As `plan`, of a subject that other plans are made for, too."""
    offload = check_arguments(stage, offload, precision)
    num_replicas, num_shards = world_size if isinstance(world_size, tuple) else (1, world_size)
    if device not in TARGETS:
        raise ValueError(f"device= is one of {', '.join(TARGETS)}, got {device!r}")
    if min(num_replicas, num_shards, ranks_per_host, accumulation) < 1:
        raise ValueError("world_size=, ranks_per_host= and accumulation= are numbers of at least 1")
    target, rule = TARGETS[device], _rule_of(optimizer)
    profile = subject.profile(precision, inputs)
    plans = subject.unit_plans(precision)
    policy = Policy(Partition(stage), num_shards, precision, subject.dtype_of(precision))
    engine = dry_engine(plans, policy, offload, num_replicas, target.receives_apart)
    walked = Walk(engine, rule, profile, target.scratch_numel).run(accumulation, no_sync)
    num_here = min(ranks_per_host, num_shards * num_replicas)
    on_host = max(peak.total_bytes for peak in walked.peaks.values()) if target.is_host else 0
    workers = WORKER_BYTES * (offload.workers or 1) if offload is not None and walked.arena_bytes else 0
    whole, said = completed(rates)
    flops = profile.flops * accumulation
    states_bytes = sum(walked.states[kind] for kind in ("gradients", "master", "moments"))
    dtype = policy.dtype_of(next(iter(subject.model.parameters())))
    work = Work(
        flops, dtype, walked.traffic, states_bytes, walked.stepped_here_numel, walked.stepped_by_workers_numel, num_here
    )
    assumptions = [said, f"{num_here} rank{'s' * (num_here > 1)} a host", target.assumption]
    if profile.is_real:
        assumptions.append("values decide the shapes of this model: activations are of one run on random ones")
    return Plan(
        model=subject.name,
        stage=stage,
        num_shards=num_shards,
        num_replicas=num_replicas,
        offload=offload,
        num_parameters=subject.numel(),
        num_trainable=subject.numel(only_trainable=True),
        states=walked.states,
        peaks=walked.peaks,
        host=walked.host,
        arena_bytes=walked.arena_bytes,
        pinned_bytes=walked.pinned_bytes,
        file_bytes=walked.file_bytes,
        overhead_bytes=target.overhead_bytes,
        host_bytes=num_here * (target.process_bytes + walked.arena_bytes + workers + on_host),
        traffic=walked.traffic,
        flops=flops,
        time=step_time(work, whole, target.is_host),
        assumptions=tuple(assumptions),
    )


def _rule_of(optimizer: str | type[ShardedOptimizer]):
    if isinstance(optimizer, str):
        if optimizer.lower() not in OPTIMIZERS:
            raise ValueError(f"optimizer= is one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
        return OPTIMIZERS[optimizer.lower()].rule
    if not (isinstance(optimizer, type) and issubclass(optimizer, ShardedOptimizer)):
        raise TypeError(f"optimizer= takes an optimizer class of zerolite or its name, got {optimizer!r}")
    return optimizer.rule
