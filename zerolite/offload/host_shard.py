"""A `Shard` in host memory: workers step it, copies to and from the device run on streams of their own.

    accumulate  D2H      the reduced range is copied to the pinned gradient on the D2H stream; a second one before the
                         step makes the workers add the first into an fp32 sum
    step        STEPPING commands go to the workers, `fence` counts behind them; old parameters read as NaN
    fetch       FETCHING behind the fence, the H2D copy of the stepped parameters; then the all-gather, where ranks
                         exchange what they stepped

[Note: when the gradient's device memory is freed]
The D2H copy reads the reduced range while backward goes on. `release`, called one bucket later, makes the compute
stream wait for that copy before the memory is used again.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from zerolite_kernels.cpu import command as abi

from zerolite.offload.arena import SharedTensor
from zerolite.offload.host import Host
from zerolite.offload.shard_memory import ShardMemory, rounded
from zerolite.offload.states import HostStates
from zerolite.runtime import trace
from zerolite.runtime.collectives import Pending
from zerolite.shards.grad_norm import add_up, sum_of_squares
from zerolite.shards.layout import Range
from zerolite.shards.parameters import FlatParameters
from zerolite.shards.shard import BucketSpec, ShardStates
from zerolite.shards.states import LEGAL, ShardState, illegal
from zerolite.shards.update import Rule, TwoPassRule, Update


class HostShard:
    """This rank's range in host memory."""

    owned: torch.Tensor  # 1D, the range in the parameters' dtype: on the device, or in the arena where that is streamed
    parameters: FlatParameters
    steps_in_background = True
    step_kind = "worker step"

    def __init__(
        self, spec: BucketSpec, host: Host, staging: torch.Tensor, unsharded: torch.Tensor, stays_unsharded: bool
    ):
        """staging, unsharded: (layout.numel,), the bucket's values in `spec.stepped_dtype` and rounded to its dtype."""
        self.spec, self.range, self.host = spec, spec.range, host
        self.unit_index = -1  # in `Engine.units`; set by `FetchQueue.add`
        self.memory = ShardMemory(host, spec)
        self.memory.set_values(spec.range.of(staging))
        self.is_streamed = host.offload.parameters and not stays_unsharded
        own = spec.range.of(unsharded)
        self.owned = self.memory.parameter.values if self.is_streamed else own if stays_unsharded else own.clone()
        self.label = f"gathering {spec.layout.name}"
        self.state = ShardState.IDLE
        self._h2d_event: tuple | None = None  # (event,) behind the last H2D copy; a tuple: on the CPU the event is None
        # () fp64, of this rank's shard of the gradient. Written on the reduction's stream, read on the compute stream,
        # which owns it: one for the whole run, so that it never goes back to the allocator between the two.
        self._squares = torch.zeros((), dtype=torch.float64, device=spec.device.device)
        self._has_squares = False
        self._is_staged = False  # the pinned gradient is not in the sum
        self._is_summed = False  # the sum holds gradients
        self._reduced: torch.Tensor | None = None  # device memory that the D2H copy reads
        self._buffer: torch.Tensor | None = None  # that `_reduced` is a range of, while lent
        self._d2h_event = None

    # Values #

    def values(self) -> torch.Tensor:
        return self.memory.values()

    def set_values(self, values: torch.Tensor) -> None:
        self._finish_h2d()
        self.memory.set_values(values)
        if not self.is_streamed:
            self.owned.copy_(self.memory.parameter.values)

    def round(self, values: torch.Tensor) -> torch.Tensor:
        return rounded(values, self.spec.dtype)

    def gather(self, unsharded: torch.Tensor) -> Pending:
        """Start the all-gather, behind the H2D copy of what is streamed. Collective."""
        if self.state is not ShardState.IDLE:
            self.fetch()
        with self.host.device.on(self.host.h2d_stream, after_current=True):
            own = self.owned
            if self.is_streamed:
                self.memory.wait()
                own = self.range.of(unsharded)
                with trace.phase("H2D", self.spec.unit_name, self.owned.nbytes):
                    self.host.device.copy(own, self.owned)
            return self._gather(unsharded, own)

    def _gather(self, unsharded: torch.Tensor, own: torch.Tensor) -> Pending:
        """All-gather on the current stream; who waits is ordered behind what the stream had before, too. Collective."""
        device = self.host.device
        event = device.record()
        self._h2d_event = (event,)
        with trace.phase("all-gather", self.spec.unit_name):
            gather = self.spec.mesh.shard.all_gather(unsharded, own, self.label + self.spec.mesh.purpose)
        return Pending((*gather.steps, lambda: device.wait(event)), gather.keepalive, self.label)

    def publish(self) -> None:
        if self.state is ShardState.STEPPING:
            self.parameters.invalidate()
            self.host.fetch_queue.push(self, self.host.device.record())
        elif self.parameters.stays_unsharded and not self.spec.owns_all:
            self.parameters.start_gather()

    # Fetch #

    def start_h2d(self, readers_done) -> None:
        """Wait for the workers, and start the H2D copy of what they stepped. Idempotent.

        readers_done: event behind the last use of the old values on the device.
        """
        if self.state is ShardState.FETCHING:
            return
        self.memory.wait()
        with self.host.device.on(self.host.h2d_stream):
            self.host.device.wait(readers_done)
            if not self.is_streamed:  # else the next gather begins on the host
                with trace.phase("H2D", self.spec.unit_name, self.owned.nbytes):
                    self.host.device.copy(self.owned, self.memory.parameter.values)
            self._h2d_event = (self.host.device.record(),)
        self._set_state(ShardState.FETCHING)

    def fetch(self) -> None:
        self.host.fetch_queue.fetch_until(self.unit_index)

    def start_fetch(self, readers_done) -> None:
        """Start moving the stepped values to every rank that needs them. Collective where parameters stay unsharded."""
        self.start_h2d(readers_done)
        self._set_state(ShardState.IDLE)
        if not self.parameters.stays_unsharded:
            return  # the next gather reads `owned`
        if self.spec.owns_all:
            event = self._h2d_event
            assert event is not None
            self.parameters.expect(Pending((lambda: self.host.device.wait(*event),), (), self.label))
        else:
            with self.host.device.on(self.host.h2d_stream):
                self.parameters.expect(self._gather(self.parameters.unsharded, self.owned))

    def _finish_h2d(self) -> None:
        """Make the host wait for the last H2D copy, before what it reads is written."""
        if self._h2d_event is not None:
            self.host.device.synchronize(*self._h2d_event)
            self._h2d_event = None

    def _set_state(self, after: ShardState) -> None:
        if (self.state, after) not in LEGAL:
            raise illegal(self.state, after, self.spec.layout.name)
        self.state = after

    # Gradient #

    def accumulate(self, reduced: torch.Tensor, buffer: torch.Tensor | None) -> torch.Tensor | None:
        is_first = not self.has_gradient
        if self._is_staged:
            self._add_staged()
        self.memory.wait()  # the last step has read the gradient, or the sum has
        self._has_squares = False
        if is_first:
            shard = self.spec.shard_range
            for part, _ in self.spec.layout.segments(shard, [True] * len(self.spec.layout.slots)):
                term = sum_of_squares(part.of(reduced, self.range), part.start - shard.start)
                self._squares.add_(term) if self._has_squares else self._squares.copy_(term)
                self._has_squares = True
            if not self._has_squares:  # the shard is padding alone: workers need not be asked
                self._squares, self._has_squares = self._squares.zero_(), True
        device, name = self.host.device, self.spec.unit_name
        with device.on(self.host.d2h_stream, after_current=True), trace.phase("D2H", name, reduced.nbytes):
            device.copy(self.memory.gradient.values, reduced)
            self._d2h_event = device.record()
        self._end_d2h = trace.flight("D2H", name)
        self._is_staged = True
        self._reduced, self._buffer = reduced, buffer
        return None

    def release(self) -> torch.Tensor | None:
        """See [Note: when the gradient's device memory is freed]."""
        if self._reduced is None:
            return None
        self.host.device.wait(self._d2h_event)
        self._end_d2h()
        buffer, self._reduced, self._buffer = self._buffer, None, None
        return buffer

    def reclaim_buffer(self) -> torch.Tensor | None:
        return None

    def begin_backward(self) -> None:
        if self._is_staged:
            self._add_staged()

    def _add_staged(self) -> None:
        """Make the workers add the pinned gradient into the sum, so that the next one can be copied there."""
        self.host.device.synchronize(self._d2h_event)
        self.memory.accumulate(is_first=not self._is_summed)
        self._is_staged, self._is_summed = False, True
        self._has_squares = False

    @property
    def has_gradient(self) -> bool:
        return self._is_staged or self._is_summed

    def gradient(self) -> torch.Tensor | None:
        if not self.has_gradient:
            return None
        values = self._gradient().values
        self.memory.wait()
        return values

    def _gradient(self) -> SharedTensor:
        """What the workers are to read: the sum, or the one gradient; zeros where no rank brought one."""
        if self._is_summed and self.memory.sum is not None:
            if self._is_staged:
                self._add_staged()
            return self.memory.sum
        if not self._is_staged:
            self.memory.wait()
            self.memory.gradient.values.zero_()
            self._is_staged, self._d2h_event = True, self.host.device.record()
        else:
            self.host.device.synchronize(self._d2h_event)
        return self.memory.gradient

    def drop_gradient(self) -> None:
        self._is_staged = self._is_summed = self._has_squares = False

    def slot_gradient(self, slot: int) -> torch.Tensor | None:
        values = self.gradient()
        self._has_squares = False  # the caller changes it
        return (
            None if values is None else self.spec.layout.slots[slot].range.intersect(self.range).of(values, self.range)
        )

    def sum_of_squares(self, counts: Sequence[bool | None], is_exact: bool) -> torch.Tensor | float:
        """What came with the gradient or, where other slots count, what the workers sum."""
        if not self.has_gradient:
            return 0.0
        if self._has_squares and all(counts) and not is_exact:
            return self._squares
        gradient = self._gradient()
        parts = [part for part, _ in self.spec.layout.segments(self.spec.shard_range, counts)]
        return sum(map(add_up, self.memory.sums(abi.NORM, parts, gradient)), 0.0)

    # States and steps #

    def state_bytes(self, names: Iterable[str]) -> int:
        return self.memory.state_bytes(names)

    def new_states(self, names: Iterable[str]) -> HostStates:
        return HostStates(self.host, self.memory, tuple(names))

    def step(self, rule: Rule, states: ShardStates, updates: Sequence[Update]) -> None:
        assert isinstance(states, HostStates)  # of `new_states`
        gradient = self._gradient()
        self._finish_h2d()
        commands = [
            self.memory.command(abi.STEP, update.range, gradient, states.encoded, **rule.numbers(update))
            for update in updates
        ]
        self.memory.submit(commands, "stepping")
        self._set_state(ShardState.STEPPING)

    def prepare(
        self, rule: TwoPassRule, states: ShardStates, updates: Sequence[Update], num_slots: int
    ) -> torch.Tensor:
        assert isinstance(states, HostStates)
        rows = self.memory.prepare(self._gradient(), states.encoded, rule, updates, num_slots)
        return rows.to(self.host.device.device)

    def resident_master(self) -> torch.Tensor | None:
        return None

    def device_tensors(self) -> Iterator[tuple[str, torch.Tensor, Range]]:
        if not self.is_streamed:
            yield "parameters", self.owned, self.range
        if self._buffer is not None:
            yield "gradients", self._buffer, self.spec.layout.range
        if self._reduced is not None:
            yield "gradients", self._reduced, self.range
