"""`zerolite.recommend`: the fastest configuration that fits, its runners-up, and why each other was rejected."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from zerolite.config import Offload, Precision, parse_bytes
from zerolite.memory import activations
from zerolite.memory.measured_rates import slowest_rates
from zerolite.memory.plan import GIB, Plan, plan_of
from zerolite.memory.rates import Rates
from zerolite.memory.subject import Inputs, Subject
from zerolite.optim.base import ShardedOptimizer
from zerolite.shards.layout import Partition
from zerolite.shards.units import UnitRule

Adapt = Callable[[nn.Module], object]

# A plan leaves out what an allocator cannot reuse: a device has to have so much more than the plan says.
RESERVE = 0.05
MEASURED_S = 0.05  # that each rate takes
OFFLOADS: dict[str, Offload | None] = {
    "none": None,
    "optimizer": Offload(),
    "parameters": Offload(parameters=True),  # at stage 3
}


@dataclass(frozen=True)
class Candidate:
    """One configuration with its plan; `why` it was rejected, empty where it fits."""

    method: str  # "full", or what adapts the model
    stage: int
    offload: str  # name in OFFLOADS, or of what was given in its place
    checkpointing: bool | None
    plan: Plan
    why: str

    @property
    def fits(self) -> bool:
        return not self.why

    @property
    def name(self) -> str:
        """As "lora, stage 3, offload parameters, checkpointing"."""
        parts = [self.method, f"stage {self.stage}"]
        parts += [f"offload {self.offload}"] if self.offload != "none" else []
        return ", ".join(parts + (["checkpointing"] if self.checkpointing else []))

    @property
    def shard_arguments(self) -> dict[str, Any]:
        """`stage` and `offload` as `zerolite.shard` takes them."""
        return {"stage": self.stage, "offload": self.plan.offload}

    def as_dict(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("name", "method", "stage", "offload", "checkpointing", "why")}
        return {**own, "fits": self.fits, "plan": self.plan.as_dict()}


@dataclass(frozen=True)
class Recommendation:
    """Configurations that fit, the fastest first, then those that do not, the nearest first."""

    candidates: tuple[Candidate, ...]
    device_bytes: int
    host_bytes: int | None

    @property
    def best(self) -> Candidate | None:
        """None: nothing fits."""
        return self.candidates[0] if self.candidates[0].fits else None

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and texts, for JSON."""
        return {
            "best": self.best.name if self.best is not None else None,
            "device_bytes": self.device_bytes,
            "host_bytes": self.host_bytes,
            "candidates": [candidate.as_dict() for candidate in self.candidates],
        }

    def __str__(self) -> str:
        has = f"{self.device_bytes / GIB:.4g} GiB a device"
        has += f", {self.host_bytes / GIB:.4g} GiB a host" if self.host_bytes is not None else ""
        if self.best is None:
            return f"nothing fits {has}; nearest is {self.candidates[0].name}: {self.candidates[0].why}"
        seconds = self.best.plan.time.total_seconds
        lines = [f"of {has}: {self.best.name}, {self.best.plan.peak_bytes / GIB:.2f} GiB, about {seconds:.3g} s a step"]
        for candidate in self.candidates[1:]:
            slower = candidate.plan.time.total_seconds / seconds
            lines.append(f"  {candidate.name}: {candidate.why or f'fits, takes {slower:.2f} times as long'}")
        return "\n".join(lines)


def recommend(
    model: nn.Module | str | Path,
    world_size: int | tuple[int, int],
    device_memory: int | str,
    host_memory: int | str | None = None,
    *,
    methods: Mapping[str, Adapt | None] | None = None,
    stages: Sequence[int] = (0, 1, 2, 3),
    offloads: Sequence[str] | Mapping[str, Offload | None] = tuple(OFFLOADS),
    checkpointing: Sequence[bool | None] | None = None,
    precision: Precision | None = None,
    optimizer: str | type[ShardedOptimizer] = "AdamW",
    batch: int = 1,
    length: int = 2048,
    chunked_loss: bool = False,
    units: UnitRule | None = None,
    step: activations.Step | None = None,
    accumulation: int = 1,
    device: str = "cuda",
    ranks_per_host: int = 8,
    no_sync: bool = False,
    rates: Rates | str | None = None,
) -> Recommendation:
    """The fastest way to train a model that fits its devices and hosts, by its plan, and why each other does not.

    What is not listed may not change: rows, length, precision, optimizer and ranks are as given.

    device_memory, host_memory: bytes of one device, and of one host with `ranks_per_host` of the ranks, as an int or
        such as "24GiB"; a twentieth of the device stays free. None: the host is not asked.
    methods: by name, what adapts a model before it is sharded, None for nothing: {"full": None, "lora": add}. Each is
        applied to a model of its own, so that several need a preset or a folder. None: {"full": None}.
    stages, offloads ("none", "optimizer", "parameters", or a mapping of names to what `zerolite.shard` takes, the
        simplest first), checkpointing (None: as the model is set): what may be chosen. checkpointing=None: off, and on
        where that does not fit, for a model of transformers.
    rates: as of `zerolite.plan`, or "measured": here and now, in about a second. Every rank must call it then, and
        the slowest counts.
    Everything else as of `zerolite.plan`. Raises ValueError as that, for unknown offloads, and where nothing is listed.
    """
    limits = parse_bytes(device_memory), parse_bytes(host_memory) if host_memory is not None else None
    if methods is None:
        methods = {"full": None}
    if isinstance(model, nn.Module) and (len(methods) > 1 or any(methods.values())):
        raise ValueError("methods= are applied to a model of their own each: name a preset or a folder, not a model")
    if not isinstance(offloads, Mapping):
        unknown = [name for name in offloads if name not in OFFLOADS]
        if unknown:
            raise ValueError(f"offloads= are of {', '.join(OFFLOADS)}; got {unknown[0]!r}")
        offloads = {name: offload for name, offload in OFFLOADS.items() if name in offloads}
    if isinstance(rates, str):
        if rates != "measured":
            raise ValueError(f'rates= takes Rates, "measured" or None, got {rates!r}')
        rates = slowest_rates(MEASURED_S)
    found: list[Candidate] = []
    for method, adapt in methods.items():
        subject = Subject(model, adapt, units, step)
        can_checkpoint = hasattr(subject.model, "gradient_checkpointing_enable")
        switches = checkpointing if checkpointing is not None else (False, True) if can_checkpoint else (None,)
        for stage, name in placements(stages, offloads, world_size):
            for switch in switches:
                plan = plan_of(
                    subject,
                    stage,
                    world_size,
                    offloads[name],
                    precision,
                    optimizer=optimizer,
                    inputs=Inputs(batch, length, switch, chunked_loss),
                    accumulation=accumulation,
                    no_sync=no_sync,
                    device=device,
                    ranks_per_host=ranks_per_host,
                    rates=rates,
                )
                found.append(Candidate(method, stage, name, switch, plan, _why(plan, *limits)))
                if found[-1].fits:
                    break  # what recomputes only takes longer
    if not found:
        raise ValueError("no configuration is listed: give stages= and offloads= that go together")
    return Recommendation(tuple(sorted(found, key=_order(limits, tuple(offloads)))), *limits)


def placements(
    stages: Sequence[int], offloads: Mapping[str, Offload | None], world_size: int | tuple[int, int]
) -> Iterator[tuple[int, str]]:
    """What is worth a plan: parameters are streamed where they are sharded, and one rank has nothing to share."""
    num_shards = world_size[1] if isinstance(world_size, tuple) else world_size
    for name, offload in offloads.items():
        of_offload = list(stages) if num_shards > 1 else list(stages)[:1]
        if offload is not None and offload.parameters:
            of_offload = [stage for stage in stages if Partition(stage).shards_parameters]
        yield from ((stage, name) for stage in of_offload)


def _order(limits: tuple[int, int | None], offloads: Sequence[str]) -> Callable[[Candidate], tuple]:
    """What fits first, the fastest, and of those alike to two digits the simplest; then by what is missing."""

    def key(candidate: Candidate) -> tuple:
        missing = sum(_lacks(candidate.plan, *limits).values())
        seconds = float(f"{candidate.plan.time.total_seconds:.1e}")
        return missing, seconds, offloads.index(candidate.offload), candidate.stage, candidate.plan.peak_bytes

    return key


def _lacks(plan: Plan, device_bytes: int, host_bytes: int | None) -> dict[str, int]:
    return plan.lacks(int(device_bytes * (1 - RESERVE)), host_bytes)


def _why(plan: Plan, device_bytes: int, host_bytes: int | None) -> str:
    lacks = _lacks(plan, device_bytes, host_bytes)
    phase, peak = max(plan.peaks.items(), key=lambda item: item[1].total_bytes)
    most = sorted(peak.bytes_of.items(), key=lambda item: -item[1])[:2]
    parts = ", ".join(f"{kind} {nbytes / GIB:.3g}" for kind, nbytes in most)
    needs = {
        "device": f"{plan.peak_bytes / GIB:.3g} GiB a device in {phase} ({parts})",
        "host": f"{plan.host_bytes / GIB:.3g} GiB a host",
    }
    said = [f"needs {needs[where]}, {missing / GIB:.3g} too many" for where, missing in lacks.items()]
    return "; ".join(said)
