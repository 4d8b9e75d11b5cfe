"""A bucket's `Shard`: this rank's range of it, its gradient and its optimizer states, wherever they lie.

`DeviceShard` lies on the device and is stepped here; offload.host_shard.HostShard lies in host memory and is stepped by
workers. The engine, the optimizers, norms and checkpoints hold a `Shard` and never ask which: whatever reads one waits
by itself for what is queued before.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import torch

from zerolite.config import master_dtype
from zerolite.runtime import trace
from zerolite.runtime.collectives import Pending
from zerolite.runtime.device import Device
from zerolite.runtime.mesh import RankMesh
from zerolite.shards.grad_norm import exact_sum_of_squares, sum_of_squares
from zerolite.shards.layout import BucketLayout, Range
from zerolite.shards.update import Operands, Rule, TwoPassRule, Update

if TYPE_CHECKING:
    from zerolite.shards.parameters import FlatParameters


@dataclass(frozen=True)
class BucketSpec:
    """What the parts of one bucket share."""

    layout: BucketLayout
    unit_name: str  # for errors and traces
    range: Range  # what this rank owns and steps
    dtype: torch.dtype  # of the parameters
    gradient_dtype: torch.dtype | None  # of the reduction; None: the bucket is frozen
    device: Device
    mesh: RankMesh

    @cached_property
    def shard_range(self) -> Range:
        """This rank's shard, also where it owns the whole bucket: the elements that it adds to norms and saves."""
        return self.layout.shard_range(self.mesh.shard.rank)

    @cached_property
    def owns_all(self) -> bool:
        return self.range.numel == self.layout.numel

    @property
    def stepped_dtype(self) -> torch.dtype:
        """What the optimizer works in."""
        return self.dtype if self.gradient_dtype is None else master_dtype(self.dtype)


class ShardStates(Protocol):
    """One optimizer's states of one shard; the optimizer owns them."""

    def read(self, name: str) -> torch.Tensor:
        """1D, the owned range, decoded; waits for the workers. Changed values go to `write`."""

    def write(self, name: str, values: torch.Tensor) -> None:
        """Store values of the owned range; waits for the workers."""

    def resident(self) -> Mapping[str, torch.Tensor]:
        """The states that lie in this process as plain tensors, by name; 1D, the owned range."""


class Shard(Protocol):
    """This rank's range of one bucket. Methods that read wait for the steps queued before; none is collective."""

    spec: BucketSpec
    range: Range
    parameters: "FlatParameters"  # the unsharded buffer that this range belongs to
    steps_in_background: bool  # `step` returns before its workers are done
    step_kind: str  # of the phase that `step` is, for the trace

    # Values

    def values(self) -> torch.Tensor:
        """1D, the owned range in `spec.stepped_dtype`; to change it, give it to `set_values`."""

    def set_values(self, values: torch.Tensor) -> None:
        """Store the owned range, and round it into the parameters' dtype."""

    def round(self, values: torch.Tensor) -> torch.Tensor:
        """`values` in the parameters' dtype, rounded as a step rounds them."""

    def gather(self, unsharded: torch.Tensor) -> Pending:
        """Start filling `unsharded`, the whole bucket, from every rank's owned range. Collective."""

    def publish(self) -> None:
        """Send stepped values to where parameters are read. Collective where ranks exchange them here."""

    def fetch(self) -> None:
        """Start the fetch of what workers stepped, of this unit and every earlier one. Collective: offload/fetch.py."""

    # Gradient

    def accumulate(self, reduced: torch.Tensor, buffer: torch.Tensor | None) -> torch.Tensor | None:
        """Add a reduced gradient (the owned range) on the current stream; the shard keeps `reduced`.

        buffer: the whole buffer that `reduced` is a range of, lent until `release` or `reclaim_buffer` returns it.
        Returns memory that the stream still reads: drop it only behind a wait for this stream.
        """

    def release(self) -> torch.Tensor | None:
        """Free device memory of a gradient that has been copied away; the lent buffer, if the shard had one."""

    def reclaim_buffer(self) -> torch.Tensor | None:
        """The lent buffer, for the next local sum, where the shard can do without it."""

    def begin_backward(self) -> None:
        """Make room for the gradient that the coming backward reduces."""

    @property
    def has_gradient(self) -> bool: ...

    def gradient(self) -> torch.Tensor | None:
        """1D, the owned range, readable; None where there is none."""

    def drop_gradient(self) -> None: ...

    def slot_gradient(self, slot: int) -> torch.Tensor | None:
        """1D, the owned part of one slot's gradient, to be changed in place; None where there is none."""

    def sum_of_squares(self, counts: Sequence[bool | None], is_exact: bool) -> torch.Tensor | float:
        """fp64 sum of squares of this rank's shard of the gradient, of the slots that count (not None)."""

    # States and steps

    def state_bytes(self, names: Iterable[str]) -> int:
        """Host memory that new states of these names take."""

    def new_states(self, names: Iterable[str]) -> ShardStates:
        """Zeros for an optimizer."""

    def step(self, rule: Rule, states: ShardStates, updates: Sequence[Update]) -> None:
        """Step the updates' segments; where a slot has no gradient on any rank, it counts as zeros."""

    def prepare(
        self, rule: TwoPassRule, states: ShardStates, updates: Sequence[Update], num_slots: int
    ) -> torch.Tensor:
        """LAMB's first pass; fp64 (world_size, num_slots, 2): squares of parameter and direction, a row a shard."""

    def resident_master(self) -> torch.Tensor | None:
        """The master copy, where it lies in this process as a plain tensor beside the parameters' own values."""

    def device_tensors(self) -> Iterator[tuple[str, torch.Tensor, Range]]:
        """(kind, tensor, its range of the bucket) of the device memory that this shard holds now."""


class DeviceStates:
    """States on the device, as tensors."""

    def __init__(self, states: dict[str, torch.Tensor]):
        self._states = states

    def read(self, name: str) -> torch.Tensor:
        return self._states[name]

    def write(self, name: str, values: torch.Tensor) -> None:
        if values.data_ptr() != self._states[name].data_ptr():
            self._states[name].copy_(values)

    def resident(self) -> Mapping[str, torch.Tensor]:
        return self._states


class DeviceShard:
    """This rank's range on the device, stepped here."""

    owned: torch.Tensor  # 1D, the range in the parameters' dtype; a view of the unsharded buffer where that stays
    master: torch.Tensor | None  # 1D, the range in fp32; what is stepped where `owned` has 16 bits
    parameters: "FlatParameters"
    steps_in_background = False
    step_kind = "optimizer step"

    def __init__(self, spec: BucketSpec, staging: torch.Tensor, unsharded: torch.Tensor, stays_unsharded: bool):
        """staging, unsharded: (layout.numel,), the bucket's values in `spec.stepped_dtype` and rounded to its dtype."""
        self.spec, self.range = spec, spec.range
        # A master keeps the bits that the values have and the parameters' dtype has not.
        self.master = spec.range.of(staging).clone() if spec.stepped_dtype != spec.dtype else None
        own = spec.range.of(unsharded)
        self.owned = own if stays_unsharded else own.clone()
        self.label = f"gathering {spec.layout.name}"
        self._gradient: torch.Tensor | None = None  # 1D, the range; mean over ranks, summed over backwards
        self._buffer: torch.Tensor | None = None  # the whole buffer that `_gradient` is a range of, while lent

    # Values #

    def values(self) -> torch.Tensor:
        return self.owned if self.master is None else self.master

    def set_values(self, values: torch.Tensor) -> None:
        own = self.values()
        if own.data_ptr() != values.data_ptr():
            own.copy_(values)
        self._round_master()

    def round(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(self.spec.dtype)

    def _round_master(self) -> None:
        if self.master is not None:
            self.owned.copy_(self.master)

    def gather(self, unsharded: torch.Tensor) -> Pending:
        """Start the all-gather. Collective."""
        with trace.phase("all-gather", self.spec.unit_name):
            return self.spec.mesh.shard.all_gather(unsharded, self.owned, self.label + self.spec.mesh.purpose)

    def publish(self) -> None:
        if self.parameters.stays_unsharded and not self.spec.owns_all:
            self.parameters.start_gather()

    def fetch(self) -> None:
        pass

    # Gradient #

    def accumulate(self, reduced: torch.Tensor, buffer: torch.Tensor | None) -> torch.Tensor | None:
        previous, self._gradient, self._buffer = self._gradient, reduced, buffer
        if previous is not None:
            reduced.add_(previous)
        return previous

    def release(self) -> torch.Tensor | None:
        return None

    def reclaim_buffer(self) -> torch.Tensor | None:
        buffer, self._buffer = self._buffer, None
        if buffer is not None and self._gradient is not None:
            self._gradient = self._gradient.clone()
        return buffer

    def begin_backward(self) -> None:
        pass

    @property
    def has_gradient(self) -> bool:
        return self._gradient is not None

    def gradient(self) -> torch.Tensor | None:
        return self._gradient

    def drop_gradient(self) -> None:
        self._gradient = self._buffer = None

    def slot_gradient(self, slot: int) -> torch.Tensor | None:
        if self._gradient is None:
            return None
        return self.spec.layout.slots[slot].range.intersect(self.range).of(self._gradient, self.range)

    def sum_of_squares(self, counts: Sequence[bool | None], is_exact: bool) -> torch.Tensor | float:
        total: torch.Tensor | float = 0.0
        if self._gradient is not None:
            squares_of = exact_sum_of_squares if is_exact else sum_of_squares
            shard = self.spec.shard_range
            for part, _ in self.spec.layout.segments(shard, counts):
                total = total + squares_of(part.of(self._gradient, self.range), part.start - shard.start)
        return total

    # States and steps #

    def state_bytes(self, names: Iterable[str]) -> int:
        return 0

    def new_states(self, names: Iterable[str]) -> DeviceStates:
        values = self.values()
        return DeviceStates({name: torch.zeros_like(values) for name in names})

    def step(self, rule: Rule, states: ShardStates, updates: Sequence[Update]) -> None:
        for update in updates:
            for part in self._parts(rule, states, update):
                rule.step(self._operands(states, part), update)
        self._round_master()

    def prepare(
        self, rule: TwoPassRule, states: ShardStates, updates: Sequence[Update], num_slots: int
    ) -> torch.Tensor:
        layout, device = self.spec.layout, self.spec.device.device
        # A row a shard, so that the order of summation does not depend on who owns which shards.
        rows = torch.zeros(layout.world_size, num_slots, 2, dtype=torch.float64, device=device)
        for update in updates:
            for part in self._parts(rule, states, update):
                rows[part.start // layout.shard_numel, update.slot] += rule.prepare(
                    self._operands(states, part), update
                )
        return rows

    def _parts(self, rule: Rule, states: ShardStates, update: Update) -> Iterator[Range]:
        """The update's range, cut where the scratch that the rule needs for it would be large."""
        segment, part_numel = update.range, self.spec.device.chunk_numel
        if segment.stop - segment.start <= part_numel or rule.is_one_pass(self._operands(states, segment)):
            yield segment
            return
        for start in range(segment.start, segment.stop, part_numel):
            yield Range(start, min(start + part_numel, segment.stop))

    def _operands(self, states: ShardStates, part: Range) -> Operands:
        if self._gradient is None:  # it was set to zero before any reduction, here or on another rank
            zeros = torch.zeros(self.range.numel, dtype=self.spec.gradient_dtype, device=self.spec.device.device)
            self._gradient = zeros
        return Operands(
            part.of(self.values(), self.range),
            part.of(self._gradient, self.range),
            {name: part.of(values, self.range) for name, values in states.resident().items()},
            part.start % self.spec.layout.shard_numel,
        )

    def resident_master(self) -> torch.Tensor | None:
        return self.master

    def device_tensors(self) -> Iterator[tuple[str, torch.Tensor, Range]]:
        yield "parameters", self.owned, self.range
        if self.master is not None:
            yield "optimizer", self.master, self.range
        if self._buffer is not None:
            yield "gradients", self._buffer, self.spec.layout.range
        if self._gradient is not None:
            yield "gradients", self._gradient, self.range
