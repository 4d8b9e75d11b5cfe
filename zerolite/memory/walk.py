"""One training step of a dry engine, event by event: the bytes of each kind where they are most, and what is sent.

A profile tells what happens in which order, and which bytes live beside model states. The engine is told the same, as
its hooks would tell it, and what it then holds is read off its buckets. So a peak is a sum of things that live at one
moment, not a sum of peaks.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from zerolite_kernels.cpu.command import BLOCK_NUMEL

from zerolite.memory.dry_engine import META, DryEngine, Traffic
from zerolite.memory.live_storages import LiveStorages
from zerolite.memory.moments import Event, Moment, Profile
from zerolite.memory.state_bytes import (
    KINDS,
    PHASES,
    Peak,
    arena_bytes,
    fixed_bytes,
    freed_units,
    gradient_bytes,
    kept_gradient_bytes,
)
from zerolite.shards.bucket import Bucket, TrainableBucket
from zerolite.shards.states import ParameterState
from zerolite.shards.update import Rule, TwoPassRule, Update

_FILE_WIDTHS = {"fp32": 4, "bf16": 2, "int8": 1}


@dataclass
class Walked:
    """What a walk has found on rank 0, which has as much as every other rank."""

    states: dict[str, int]  # by kind, at the end of backward; units that are gathered for a while left out
    peaks: dict[str, Peak]  # by phase
    host: dict[str, int]  # by kind
    traffic: Traffic
    arena_bytes: int = 0
    pinned_bytes: int = 0
    file_bytes: int = 0
    stepped_by_workers_numel: int = 0
    stepped_here_numel: int = 0  # on the device


class Walk:
    """A dry engine on its way through a step."""

    def __init__(self, engine: DryEngine, rule: Rule, profile: Profile, scratch_numel: int):
        """scratch_numel: elements that a step on this device works on at once beside its operands; 0: in place."""
        self.engine, self.rule, self.profile = engine, rule, profile
        self.scratch_numel = scratch_numel
        self.live = LiveStorages()  # of gradients and of what is in flight; built states lie outside
        engine.host.leave_out = self.live.leave_out
        self.buckets = [bucket for unit in engine.units for bucket in unit.buckets]
        self.states = {bucket: self._new_states(bucket) for bucket in engine.reducer.order}
        self.slots = {
            slot.name: (bucket, index, torch.empty(slot.shape, dtype=bucket.shard.spec.dtype, device=META))
            for bucket in engine.reducer.order
            for index, slot in enumerate(bucket.layout.slots)
        }  # with what autograd would deliver, which the profile counts
        self.fixed = fixed_bytes(self.buckets, self._resident_states)
        self.gathered = list(freed_units(engine.units))
        self.peaks = {phase: Peak(dict.fromkeys(KINDS, 0)) for phase in PHASES}
        self._num_reduced = self._reduced_bytes = 0  # buckets, in the reducer's order, whose shard has its gradient
        self._base_bytes, self._is_tail = 0, False  # activations before the head; whether it runs

    def run(self, accumulation: int, no_sync: bool = False) -> Walked:
        """`accumulation` micro-batches, each reduced or all but the last inside `zerolite.no_sync`, and a step."""
        with torch.no_grad():
            for index in range(accumulation):
                self.engine.is_syncing = index + 1 == accumulation or not no_sync
                self._micro_batch()
            gradients = sum(map(gradient_bytes, self.engine.reducer.order))
            self._step()
        found = Walked(
            {**self.fixed, "gradients": gradients},
            self.peaks,
            arena_bytes(self.buckets, self.engine.host.arena.nbytes),
            self.engine.traffic,
        )
        host = self.engine.host
        found.arena_bytes, found.pinned_bytes = host.arena.nbytes, host.arena.pinned_bytes
        found.file_bytes = host.states_bytes
        for bucket in self.engine.reducer.order:
            if bucket.shard.steps_in_background:
                found.stepped_by_workers_numel += bucket.shard.range.numel
            else:
                found.stepped_here_numel += bucket.shard.range.numel
        return found

    # What there is before the first step #

    def _new_states(self, bucket: TrainableBucket):
        """The optimizer's states of one bucket; those of a drive are counted alone."""
        memory = self.engine.host
        if not (memory.has_drive and bucket.shard.steps_in_background):
            return bucket.shard.new_states(self.rule.state_names)
        format = "fp32" if bucket.shard.spec.dtype == torch.float64 else memory.offload.states
        width = 8 if bucket.shard.spec.dtype == torch.float64 else _FILE_WIDTHS[format]
        owned, shard_numel = bucket.shard.range.numel, bucket.layout.shard_numel
        for _ in self.rule.state_names:
            memory.keep_in_file(shard_numel, owned // shard_numel, width)
            if format == "int8":
                memory.allocate(owned // BLOCK_NUMEL, torch.float32)
        return bucket.shard.new_states(())

    def _resident_states(self, bucket: Bucket) -> Iterable[torch.Tensor]:
        states = self.states.get(bucket)  # type: ignore[call-overload]
        return states.resident().values() if states is not None else ()

    # Events #

    def _micro_batch(self) -> None:
        needs_backward = {moment.unit for moment in self.profile.moments if moment.event is Event.BACKWARD}
        phase = "forward"
        for moment in self.profile.moments:
            with self.live:
                self._tell(moment, moment.unit in needs_backward)
            if moment.event in (Event.LOSS, Event.BACKWARD, Event.GRADIENT):
                phase = "backward"
            self._note(phase, moment)

    def _tell(self, moment: Moment, needs_backward: bool) -> None:
        engine, unit = self.engine, self.engine.units[moment.unit]
        if moment.event is Event.FORWARD:
            engine.pre_forward(unit)
        elif moment.event is Event.END_FORWARD:
            engine.post_forward(unit, needs_backward)
        elif moment.event in (Event.BACKWARD, Event.BACKWARD_AGAIN):
            engine.pre_backward(unit, is_first=moment.event is Event.BACKWARD)
        elif moment.event is Event.END_BACKWARD:
            engine.post_backward(unit, has_begun=True)
        elif moment.event is Event.GRADIENT:
            bucket, index, gradient = self.slots[moment.parameter]
            bucket.gradients.accumulate(index, gradient)
            if engine.is_syncing:
                engine.reducer.mark_ready(bucket, index)
        elif moment.event is Event.END:
            engine.finish_backward()

    def _step(self) -> None:
        """What `ShardedOptimizer.step` has the shards do, and the fetch of what workers stepped."""
        scratch = 0
        with self.live:
            self.engine.before_step()
            for bucket in self.engine.reducer.order:  # the norm
                bucket.shard.sum_of_squares([True] * len(bucket.layout.slots), is_exact=False)
            if self.rule.is_per_parameter:
                self._prepare(cast(TwoPassRule, self.rule))
            for bucket in self.engine.reducer.order:
                width = bucket.shard.spec.stepped_dtype.itemsize
                if not bucket.shard.steps_in_background:
                    scratch = max(scratch, min(self.scratch_numel, bucket.shard.range.numel) * width)
                states = self.states[bucket]
                bucket.shard.step(self.rule, states, [])
                bucket.shard.publish()
            for unit in self.engine.units:
                unit.wait()
            self._note("step", None, {"step scratch": scratch})
            self.engine.clear_gradients()
            self.engine.fetch()

    def _prepare(self, rule: TwoPassRule) -> None:
        """What LAMB's first pass adds: rows of sums, and those of all ranks in one gather (`Lamb._sum_over_ranks`)."""
        order, rows = self.engine.reducer.order, []
        for bucket in order:
            slots = bucket.layout.slots
            updates = list(_updates(bucket)) if bucket.shard.steps_in_background else []  # a device's need no memory
            rows.append(bucket.shard.prepare(rule, self.states[bucket], updates, len(slots)).view(-1))
        flat = torch.cat([row.to(META) for row in rows])
        if not all(bucket.shard.spec.owns_all for bucket in order):
            flat = torch.empty(self.engine.mesh.shard.size, flat.numel(), dtype=flat.dtype, device=META).sum(dim=0)
        self._note("step", None)

    def _note(self, phase: str, moment: Moment | None, more: Mapping[str, int] | None = None) -> None:
        """Keep what lives now, if it is the most of this phase."""
        if moment is not None and moment.unit != 0:
            if moment.event is Event.END_FORWARD:
                self._base_bytes = moment.live_bytes
            self._is_tail = moment.event is Event.END_FORWARD
        in_flight = sum(nbytes for bucket, nbytes in self.gathered if bucket.state is not ParameterState.SHARDED)
        during = self.live.take_peak() + (moment.live_bytes if moment is not None else 0)
        after = self.live.current_bytes + (moment.peak_bytes if moment is not None else 0)
        fixed = sum(self.fixed.values())
        total = fixed + in_flight + max(during, after) + sum((more or {}).values())
        if total <= self.peaks[phase].total_bytes:
            return
        beside = 0 if moment is None else moment.live_bytes if during > after else moment.peak_bytes
        gradients = self._finished_bytes()
        logits = max(0, beside - self._base_bytes) if self._is_tail and moment is not None else 0
        self.peaks[phase] = Peak(
            dict.fromkeys(KINDS, 0)
            | self.fixed
            | {
                "units in flight": in_flight,
                "gradients": gradients,
                "buckets": max(during, after) - beside - gradients,
                "activations": beside - logits,
                "logits": logits,
            }
            | dict(more or {})
        )

    def _finished_bytes(self) -> int:
        """Of gradients that shards have on the device."""
        order = self.engine.reducer.order
        while self._num_reduced < len(order) and order[self._num_reduced].shard.has_gradient:
            self._reduced_bytes += kept_gradient_bytes(order[self._num_reduced])
            self._num_reduced += 1
        return min(self._reduced_bytes, self.live.current_bytes)


def _updates(bucket: TrainableBucket) -> Iterator[Update]:
    """One of each part of a parameter in each shard that this rank owns, as `ShardedOptimizer` makes them."""
    hyper = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0}
    for shard in bucket.layout.shard_ranges(bucket.shard.range):
        for index, slot in enumerate(bucket.layout.slots):
            part = slot.range.intersect(shard)
            if part.numel:
                yield Update(part, hyper, step=1, multiplier=1.0, slot=index)
