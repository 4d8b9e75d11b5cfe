"""Gradients of one bucket: added up locally as autograd delivers them, then reduced into the bucket's shard.

    accumulate      a parameter's gradient is ready           it is added into `local`, this rank's unreduced flat sum
    start_reduce    the bucket is full, or backward ended     `local` starts its reduce-scatter
    finish_reduce   the next bucket started, or the end       the mean over ranks is added into the shard's gradient

Where whole gradients stay (stages 0 and 1) the reduced range is a view of the whole buffer, which was reduced in place,
so that nothing exists twice; else the buffer goes back to the pool.

[Note: one bucket behind]
`finish_reduce` of bucket k runs right after `start_reduce` of bucket k + 1, so two whole buckets are in flight at most.
On CUDA the reduction runs on its own stream; the compute stream waits for bucket k there, which lets a reduction last
as long as the backward of one bucket before it delays anything. Tensors are allocated on the compute stream and freed
only behind that wait.
"""

from collections.abc import Iterator, Sequence

import torch

from zerolite.runtime import trace
from zerolite.runtime.collectives import Pending
from zerolite.shards.shard import BucketSpec, Shard


class BufferPool:
    """Flat buffers lent to buckets during a backward pass and dropped at its end."""

    def __init__(self):
        self._free: dict[tuple[int, torch.dtype], list[torch.Tensor]] = {}

    def borrow(self, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        free = self._free.get((numel, dtype))
        return free.pop() if free else torch.empty(numel, dtype=dtype, device=device)

    def give_back(self, buffer: torch.Tensor) -> None:
        self._free.setdefault((buffer.numel(), buffer.dtype), []).append(buffer)

    def clear(self) -> None:
        self._free.clear()

    @property
    def nbytes(self) -> int:
        """Of buffers that nobody has borrowed."""
        return sum(buffer.nbytes for buffers in self._free.values() for buffer in buffers)


class FlatGradients:
    """The gradients of one trainable bucket on this rank, until its shard has them."""

    local: torch.Tensor | None  # 1D, layout.numel, reduce dtype; this rank's sum, not reduced yet

    def __init__(self, spec: BucketSpec, shard: Shard, pool: BufferPool, stream, keeps_whole: bool):
        """stream: that reductions run on. keeps_whole: the shard keeps its gradient inside the reduced buffer."""
        if spec.gradient_dtype is None:
            raise ValueError(f"{spec.layout.name} is frozen, it gets no gradients")
        self.dtype = spec.gradient_dtype
        self.spec, self.layout, self.shard = spec, spec.layout, shard
        self.pool, self.stream = pool, stream
        self.keeps_whole = keeps_whole
        self.label = f"reducing the gradients of {spec.layout.name}"
        self.local = None
        self.was_used = [False] * len(self.layout.slots)  # has autograd given this slot a gradient since `clear`
        self._filled = [False] * len(self.layout.slots)  # does `local` hold a gradient of this slot
        self._in_flight: tuple[torch.Tensor, torch.Tensor, Pending] | None = None

    @property
    def has_unreduced(self) -> bool:
        return any(self._filled)

    def buffers(self) -> Iterator[torch.Tensor]:
        """What is here on the device beside the shard's gradient: the local sum, and what its reduction reads."""
        if self.local is not None:
            yield self.local
        if self._in_flight is not None:
            local, shard, pending = self._in_flight
            yield local
            yield shard
            yield from (kept for kept in pending.keepalive if isinstance(kept, torch.Tensor))

    def accumulate(self, index: int, gradient: torch.Tensor) -> None:
        """Add one parameter's gradient (its shape, any dtype) into the local sum."""
        if self.local is None:
            self.local = self._empty_local()
        slot = self.layout.slots[index]
        view = slot.range.of(self.local).view(slot.shape)
        if self._filled[index]:
            view.add_(gradient)
        else:
            view.copy_(gradient)
            self._filled[index] = True
        self.was_used[index] = True

    def start_reduce(self) -> None:
        """Start reducing the local sum; slots without a gradient count as zeros. Collective."""
        mesh = self.spec.mesh
        local = self.local if self.local is not None else self._empty_local()
        for slot, is_filled in zip(self.layout.slots, self._filled, strict=True):
            if not is_filled:
                slot.range.of(local).zero_()
        for gap in self.layout.gaps:
            gap.of(local).zero_()
        self._filled = [False] * len(self.layout.slots)
        self.local = None
        shard = self.spec.shard_range.of(local)
        if not (self.keeps_whole or mesh.shard.size == 1):
            shard = torch.empty_like(shard)
        self._end_flight = trace.flight("reduce-scatter", self.spec.unit_name)
        with self.spec.device.on(self.stream, after_current=True):
            self._in_flight = (local, shard, mesh.shard.reduce_scatter(local, shard, mesh.world_size, self.label))

    def finish_reduce(self) -> None:
        """Add the reduction in flight, if any, to the shard. Collective at stage 0 and where there are replicas."""
        if self._in_flight is None:
            return
        local, shard, pending = self._in_flight
        self._in_flight = None
        spec = self.spec
        with spec.device.on(self.stream):
            with trace.phase("reduce-scatter wait", spec.unit_name):
                pending.wait()
            self._end_flight()
            spec.mesh.replicas.all_reduce(shard)
            if spec.owns_all:
                spec.mesh.shard.all_gather(local, shard, self.label).wait()
            is_lent = self.keeps_whole or spec.owns_all
            reduced = spec.range.of(local) if is_lent else shard
            still_read = self.shard.accumulate(reduced, local if is_lent else None)
            event = spec.device.record()
        spec.device.wait(event)  # See [Note: one bucket behind]
        del still_read
        if not is_lent:
            self.pool.give_back(local)

    def release(self) -> None:
        """Return the buffer that the shard has copied its gradient out of."""
        buffer = self.shard.release()
        if buffer is not None:
            self.pool.give_back(buffer)

    def clear(self, indices: Sequence[int], set_to_none: bool = True) -> None:
        """Drop the gradients of some slots; `set_to_none=False` leaves zeros that count as gradients, as in torch."""
        self.finish_reduce()
        for index in indices:
            self._filled[index] = False
            self.was_used[index] = self.was_used[index] and not set_to_none
        if not any(self._filled):
            self.local = None
        if any(self.was_used):
            for index in indices:
                part = self.shard.slot_gradient(index)
                if part is not None:
                    part.zero_()
        else:
            self.shard.drop_gradient()

    def scale(self, scales: Sequence[float]) -> None:
        """Multiply each slot's gradient, reduced and not; between two backwards."""
        for index, scale in enumerate(scales):
            if scale != 1.0:
                if self._filled[index] and self.local is not None:
                    self.layout.slots[index].range.of(self.local).mul_(scale)
                part = self.shard.slot_gradient(index)
                if part is not None:
                    part.mul_(scale)

    def _empty_local(self) -> torch.Tensor:
        """A buffer for the local sum: the one lent to the shard, once its range has left it, or one of the pool.

        While a reduction is in flight that buffer is not to be had: waiting for it here would put this rank's
        collectives in another order than its peers'.
        """
        buffer = self.shard.reclaim_buffer() if self._in_flight is None else None
        if buffer is not None:
            return buffer
        return self.pool.borrow(self.layout.numel, self.dtype, self.spec.device.device)
