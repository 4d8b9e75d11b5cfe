"""Gradients of one bucket: taken from autograd as they come, reduced to the owned range, kept until the step.

    take      a parameter's gradient is ready           it is added into `local`, the unreduced flat sum of this rank
    launch    the bucket is full, or backward ended     `local` starts its reduce-scatter
    land      the next bucket was launched, or the end  the mean over ranks is added into `reduced`, the owned range

Where whole gradients stay (stages 0 and 1) `reduced` is a range of the whole buffer that was reduced in place, so that
nothing is held twice; else the buffer goes back to the pool when it has landed.

[Note: one bucket behind]
`land(k)` runs right after `launch(k + 1)`, so two whole buckets are in flight at most. On CUDA the reduction runs on
its own stream; the compute stream waits for bucket k there, which lets a reduction take as long as the backward of one
bucket before it delays anything. Tensors are allocated on the compute stream and freed only behind that wait.

[Note: the way down]
With offload the reduced range goes on to its slot in host memory, on a stream of its own, and `let_go` frees its
device memory one bucket later. A second gradient before the step adds up on the host, in fp32: `fold` has the workers
add the slot into a sum, at the beginning of the next backward, so that the slot is free when it is needed.
"""

from collections.abc import Sequence

import torch

from zerolite.offload.arena import Field
from zerolite.offload.host_shard import HostBucket
from zerolite.runtime.collectives import Group, Pending
from zerolite.runtime.device import Cpu, Cuda
from zerolite.shards.grad_norm import sum_of_squares
from zerolite.shards.layout import BucketLayout


class BufferPool:
    """Flat buffers lent to buckets during a backward pass and dropped at its end."""

    def __init__(self):
        self._free: dict[tuple[int, torch.dtype], list[torch.Tensor]] = {}

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        free = self._free.get((numel, dtype))
        return free.pop() if free else torch.empty(numel, dtype=dtype, device=device)

    def give(self, buffer: torch.Tensor) -> None:
        self._free.setdefault((buffer.numel(), buffer.dtype), []).append(buffer)

    def clear(self) -> None:
        self._free.clear()


class GradientBucket:
    """The gradients of one trainable bucket on this rank."""

    local: torch.Tensor | None  # 1D, layout.numel, reduce dtype; this rank's sum that no reduction has taken yet
    reduced: torch.Tensor | None  # 1D, the owned range, reduce dtype; mean over ranks, summed over backwards

    def __init__(
        self,
        layout: BucketLayout,
        start: int,
        stop: int,
        *,
        dtype: torch.dtype,
        device: Cpu | Cuda,
        stream,
        shard_group: Group,
        replicate_group: Group,
        keeps_whole: bool,
        pool: BufferPool,
        host: HostBucket | None = None,
    ):
        """host: where the reduced range goes; `reduced` then stays None."""
        self.layout = layout
        self.start, self.stop = start, stop
        self.dtype, self.device, self.stream = dtype, device, stream
        self.shard_group, self.replicate_group = shard_group, replicate_group
        self.keeps_whole = keeps_whole and host is None
        self.host = host
        self.pool = pool
        self.label = f"reducing the gradients of {layout.name}"
        self.local = None
        self.reduced = None
        self.was_used = [False] * len(layout.slots)  # has autograd given this slot a gradient since the last `clear`
        self._filled = [False] * len(layout.slots)  # does `local` hold a gradient of this slot
        self.whole: torch.Tensor | None = None  # the buffer that `reduced` is a range of, where whole gradients stay
        self._in_flight: tuple[torch.Tensor, torch.Tensor, Pending] | None = None
        self.squares: torch.Tensor | None = None  # 0-dim fp64, of this rank's piece; where it is on the host and known
        self._is_staged = False  # the host's slot holds a gradient that is not in its sum
        self._is_summed = False  # the host's sum holds gradients
        self._descending: torch.Tensor | None = None  # device memory that the copy down reads
        self._landed = None  # event behind that copy

    @property
    def has_unreduced(self) -> bool:
        return any(self._filled)

    @property
    def has_reduced(self) -> bool:
        return self.reduced is not None or self._is_staged or self._is_summed

    def take(self, index: int, gradient: torch.Tensor) -> None:
        """Add one parameter's gradient (its shape, any dtype) into the local sum."""
        if self.local is None:
            self.local = self._empty_local()
        slot = self.layout.slots[index]
        view = self.local[slot.offset : slot.stop].view(slot.shape)
        if self._filled[index]:
            view.add_(gradient)
        else:
            view.copy_(gradient)
            self._filled[index] = True
        self.was_used[index] = True

    def launch(self) -> None:
        """Start reducing the local sum; slots without a gradient count as zeros. Collective."""
        local = self.local if self.local is not None else self._empty_local()
        for slot, is_filled in zip(self.layout.slots, self._filled, strict=True):
            if not is_filled:
                local[slot.offset : slot.stop].zero_()
        for start, stop in self.layout.gaps():
            local[start:stop].zero_()
        self._filled = [False] * len(self.layout.slots)
        self.local = None
        first, last = self.layout.piece(self.shard_group.rank)
        in_place = self.keeps_whole or self.shard_group.size == 1
        piece = local[first:last] if in_place else torch.empty_like(local[first:last])
        divisor = self.shard_group.size * self.replicate_group.size
        with self.device.on(self.stream, after_current=True):
            self._in_flight = (local, piece, self.shard_group.reduce_scatter(local, piece, divisor, self.label))

    def land(self) -> None:
        """Add the reduction in flight, if any, into `reduced`. Collective at stage 0 and where there are replicas."""
        if self._in_flight is None:
            return
        local, piece, pending = self._in_flight
        self._in_flight = None
        with self.device.on(self.stream):
            pending.wait()
            self.replicate_group.all_reduce(piece)
            owns_all = self.stop - self.start == self.layout.numel
            if owns_all:
                self.shard_group.all_gather(local, piece, self.label).wait()
            result = local[self.start : self.stop] if self.keeps_whole or owns_all else piece
            if self.reduced is not None:
                result.add_(self.reduced)
            if self.host is not None:
                self._descend(result)
            event = self.device.record()
        self.device.wait(event)  # See [Note: one bucket behind]
        if self.host is not None:
            self._descending = local if owns_all else piece
            if self._descending is not local:
                self.pool.give(local)
            return
        self.reduced = result
        if self.keeps_whole:
            self.whole = local
        else:
            self.pool.give(local)

    # On the host: see [Note: the way down] #

    def _descend(self, result: torch.Tensor) -> None:
        """Start the copy of the reduced range, behind the current stream, to the host's slot."""
        host, is_first = self.host, not self.has_reduced
        self.fold()
        host.wait()  # the last step has read the slot, or the sum has taken it
        low, high = self.layout.piece(self.shard_group.rank)
        self.squares = None
        if is_first:
            for run in self.layout.runs(low, high, [True] * len(self.layout.slots)):
                squares = sum_of_squares(result[run.start - self.start : run.stop - self.start], run.start - low)
                self.squares = squares if self.squares is None else self.squares + squares
        with self.device.on(host.host.down_stream, after_current=True):
            self.device.copy(host.gradient.values, result)
            self._landed = self.device.record()
        self._is_staged = True

    def let_go(self) -> None:
        """Free the device memory of a gradient on its way down, behind the copy."""
        if self._descending is not None:
            self.device.wait(self._landed)
            if self._descending.numel() == self.layout.numel:
                self.pool.give(self._descending)
            self._descending = None

    def fold(self) -> None:
        """Have the workers add the slot into the sum."""
        if not self._is_staged:
            return
        self.device.synchronize(self._landed)
        self.host.accumulate(is_first=not self._is_summed)
        self._is_staged, self._is_summed = False, True
        self.squares = None

    def on_host(self) -> Field:
        """The memory that holds this bucket's gradient, landed; zeros where no rank brought one."""
        if self._is_summed:
            self.fold()
            return self.host.sum
        if not self._is_staged:
            self.host.wait()
            self.host.gradient.values.zero_()
            self._is_staged = True
        elif self._landed is not None:
            self.device.synchronize(self._landed)
        return self.host.gradient

    def require(self) -> torch.Tensor:
        """`reduced`; zeros where a gradient was set to zero before any reduction, here or on another rank."""
        if self.reduced is None:
            self.reduced = torch.zeros(self.stop - self.start, dtype=self.dtype, device=self.device.device)
        return self.reduced

    def clear(self, indices: Sequence[int], set_to_none: bool = True) -> None:
        """Forget the gradients of some slots; `set_to_none=False` leaves zeros that count as gradients, as in torch."""
        self.land()
        for index in indices:
            self._filled[index] = False
            self.was_used[index] = self.was_used[index] and not set_to_none
        if not any(self._filled):
            self.local = None
        if not any(self.was_used):
            self.reduced = self.whole = self.squares = None
            self._is_staged = self._is_summed = False
        elif self.host is not None and self.has_reduced:
            held = self.on_host().values
            self.host.wait()
            for index in indices:
                first, last = self.layout.overlap(self.layout.slots[index], self.start, self.stop)
                held[first - self.start : last - self.start].zero_()
            self.squares = None
        elif self.reduced is not None:
            for index in indices:
                first, last = self.layout.overlap(self.layout.slots[index], self.start, self.stop)
                self.reduced[first - self.start : last - self.start].zero_()

    def _empty_local(self) -> torch.Tensor:
        """A buffer for the local sum: the whole one that stayed, once the reduced range has left it, or a lent one.

        While that buffer is in flight the sum goes to another one: waiting here would put this rank's collectives in
        another order than its peers'.
        """
        if self.whole is not None and self._in_flight is None:
            whole, self.whole = self.whole, None
            self.reduced = self.reduced.clone()
            return whole
        return self.pool.take(self.layout.numel, self.dtype, self.device.device)
