"""What an out-of-memory error is answered with: the kinds that lived, the plan beside them, and what takes less.

[Note: what takes less]
Other stages and offloads are planned as `zerolite.plan` does, by a dry engine over the units of the running one, with
the optimizer that it has. Activations are those that were measured: neither changes them. So what is told is a
difference of two plans of the same step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from zerolite.engine.engine import Engine
from zerolite.memory.moments import Profile
from zerolite.memory.plan import TARGETS, Plan, plan_of
from zerolite.memory.recommend import OFFLOADS, placements
from zerolite.memory.subject import Inputs, Subject, is_checkpointing
from zerolite.memory.track_texts import columns, host_line, kinds_table, shown
from zerolite.runtime import device as devices
from zerolite.shards.units import UnitPlan

if TYPE_CHECKING:
    from zerolite.memory.track import Tracker

LEAST_SHARE = 0.02  # of the peak, that a change has to save to be told
MAX_CHANGES = 4


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python could not get memory, on the device or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def answer(error: BaseException, tracker: Tracker) -> None:
    """Add a note to an out-of-memory error; any other stays as it is. In Python 3.10 the note is in its message."""
    if not is_out_of_memory(error):
        return
    note = explained(error, tracker)
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:
        error.args = (f"{error}\n{note}", *error.args[1:])


def explained(error: BaseException, tracker: Tracker) -> str:
    """Text of several lines."""
    number = tracker.steps[-1].number + 1 if tracker.steps else 1
    where = f", after {tracker.last_label}" if tracker.last_label else ""
    lines = [f"zerolite.track: out of memory in {tracker.phase} of step {number}{where}"]
    peak = tracker.peaks[tracker.phase]
    try:
        changes = _Changes(error, tracker)
        plan = tracker.plan if tracker.plan is not None else changes.present
        lines += kinds_table(columns({tracker.phase: peak}, plan))
        if tracker.plan is None and tracker.phase in plan.peaks:
            lines.append("planned without activations: give track(plan=zerolite.plan(...)) to see them planned, too")
        told = list(changes)
    except Exception as problem:  # the error that is answered must not be replaced by one of the answer
        lines += kinds_table(columns({tracker.phase: peak}, tracker.plan))
        told = [f"no other configuration could be planned: {problem}"]
    lines += filter(None, [host_line(tracker)])
    return "\n".join([*lines, "what takes less:", *(f"  {change}" for change in told)])


class _Running(Subject):
    """The sharded model of an engine, to plan it otherwise; without activations, which were measured."""

    def __init__(self, engine: Engine):
        self.name, self.model = type(engine.model).__name__, engine.model
        self._units: list[UnitPlan] = []
        for unit in engine.units:
            groups = {id(bucket.group): bucket.group for bucket in unit.buckets}
            self._units.append(UnitPlan(unit.name, unit.module, list(groups.values())))

    def unit_plans(self, precision) -> list[UnitPlan]:
        return self._units

    def profile(self, precision, inputs: Inputs) -> Profile:
        return Profile.without_activations(self._units)


class _Changes:
    """What takes less memory than the run that failed, as lines. See [Note: what takes less]."""

    def __init__(self, error: BaseException, tracker: Tracker):
        self.tracker, self.engine = tracker, tracker.engine
        self.subject = _Running(tracker.engine)
        is_of_device, has_bus = isinstance(error, torch.OutOfMemoryError), devices.has_bus(self.engine.device.device)
        # Without a bus the device's memory is the host's.
        self.counts_device, self.counts_arena = is_of_device or not has_bus, not (is_of_device and has_bus)
        self.present = self._plan(self.engine.partition.stage, self.engine.placement.offload)

    def __iter__(self) -> Iterator[str]:
        peak = self.tracker.peaks[self.tracker.phase]
        yield from self._configurations(peak.total_bytes)
        activations = peak.bytes_of["activations"] + peak.bytes_of["logits"]
        if self.counts_device and activations > LEAST_SHARE * peak.total_bytes:
            yield f"half the rows a micro-batch, twice the accumulation: about {shown(activations // 2)} less"
            if not is_checkpointing(self.engine.model):
                yield (
                    "activation checkpointing (model.gradient_checkpointing_enable()): of "
                    f"{shown(activations)} of activations little more than each block's inputs stays"
                )
        subject = self.subject
        if subject.numel(only_trainable=True) == subject.numel():
            trained = sum(peak.bytes_of[kind] for kind in ("gradients", "master", "moments", "buckets"))
            yield f"LoRA (zerolite.adapters.add_lora before shard): most of {shown(trained)} of gradients and states"
        allocator = self.tracker.reserved_bytes - self.tracker.points[-1].usage.total_bytes
        if self.tracker.reserved_bytes and allocator > LEAST_SHARE * peak.total_bytes:
            yield (
                f"PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True: the allocator has {shown(allocator)} that no "
                "tensor uses"
            )

    def _configurations(self, peak_bytes: int) -> Iterator[str]:
        """Stages and offloads, the simplest first; each has to save more than those before it."""
        mesh = self.engine.mesh
        best, told = self._needs(self.present) - int(LEAST_SHARE * peak_bytes), 0
        for stage, name in placements(range(4), OFFLOADS, (mesh.replicas.size, mesh.shard.size)):
            needs = self._needs(self._plan(stage, OFFLOADS[name]))
            if needs >= best or told == MAX_CHANGES:
                continue
            best, told = needs, told + 1
            offload = {"none": "", "optimizer": ', offload="cpu"', "parameters": ", offload=Offload(parameters=True)"}
            yield f"shard(stage={stage}{offload[name]}): {shown(self._needs(self.present) - needs)} less"

    def _plan(self, stage: int, offload) -> Plan:
        mesh = self.engine.mesh
        return plan_of(
            self.subject,
            stage,
            (mesh.replicas.size, mesh.shard.size),
            offload,
            self.engine.precision,
            optimizer=type(self.tracker.optimizer),
            inputs=Inputs(batch=None),
            device=next(kind for kind in TARGETS if kind == self.engine.device.device.type),
        )

    def _needs(self, plan: Plan) -> int:
        """Bytes at its peak, with the activations that were measured."""
        arena = plan.arena_bytes if self.counts_arena else 0
        if not self.counts_device:
            return arena
        measured = self.tracker.peaks
        return arena + max(
            peak.total_bytes
            + sum(measured[phase].bytes_of[kind] for kind in ("activations", "logits") if phase in measured)
            for phase, peak in plan.peaks.items()
        )
