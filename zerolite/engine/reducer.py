"""Which bucket is reduced when: DDP's reducer, over sharded gradients.

[Note: the order of collectives]
Every rank must issue the same collectives in the same order, whatever order autograd delivers gradients in. So
reductions start strictly in `Reducer.order` (the reverse of registration): a bucket that is ready early waits for its
predecessors. One that never fills (a parameter without a gradient on this rank) is reduced, with zeros, when its
unit's backward has passed, or at the end of backward. Nothing is recorded from an earlier step.

[Note: late gradients]
A gradient may come after the reduction of its bucket started (a layer used in two reentrant checkpoints). It stays in
the local sum, as inside `no_sync`, and is reduced by the next backward or, after all ranks have compared what is
unreduced, by the step.
"""

from collections.abc import Iterable, Mapping, Sequence

from zerolite.runtime import trace
from zerolite.runtime.device import Device
from zerolite.shards.bucket import Bucket, TrainableBucket, Unit
from zerolite.shards.gradients import BufferPool


class Reducer:
    """Starts each bucket's reduction, and finishes it one bucket behind: gradients.py, [Note: one bucket behind]."""

    order: list[TrainableBucket]  # the last registered first

    def __init__(self, device: Device):
        self.order = []
        self.pool = BufferPool()
        self.stream = device.new_stream()
        self.version = 0  # counts what changes the gradients, so that a norm knows when it is out of date
        self._next = 0  # in `order`, the first bucket whose reduction has not started in this backward
        self._in_flight: TrainableBucket | None = None  # the last that started
        self._finished: TrainableBucket | None = None  # the last that finished; its device memory may still be read

    def add(self, buckets: Iterable[Bucket]) -> None:
        self.order += [bucket for bucket in buckets if isinstance(bucket, TrainableBucket)]
        self.order.sort(key=lambda bucket: -bucket.position)

    def begin_backward(self) -> None:
        for bucket in self.order:
            bucket.shard.begin_backward()

    def mark_ready(self, bucket: TrainableBucket, index: int) -> None:
        """A slot of the bucket has its gradient."""
        bucket.ready.add(index)
        if len(bucket.ready) == len(bucket.layout.slots):
            self._start_ready()

    def mark_passed(self, unit: Unit) -> None:
        """The unit's backward has ended: what has no gradient now gets none."""
        for bucket in unit.buckets:
            bucket.ready.update(range(len(bucket.layout.slots)))
        self._start_ready()

    def finish(self) -> None:
        """Reduce what no backward of a unit has reduced, and wait for all. Collective."""
        for bucket in self.order[self._next :]:
            self._start(bucket)
        self.drain()

    def drain(self) -> None:
        """Finish the reduction in flight. Collective where finishing is."""
        if self._in_flight is not None:
            self._in_flight.gradients.finish_reduce()
            self._release()
            self._finished, self._in_flight = self._in_flight, None
            self.version += 1

    def reset(self) -> None:
        """Forget how far this backward came."""
        self._next = 0
        self._release()
        self.pool.clear()
        for bucket in self.order:
            bucket.ready.clear()

    def reduce_late(self, buckets: Sequence[TrainableBucket]) -> None:
        """Reduce local sums that no backward has reduced. Collective: the same buckets on every rank."""
        for bucket in buckets:
            self._start(bucket)
        self.drain()
        self._release()
        self.pool.clear()

    def clear(self, slots: Mapping[Bucket, Sequence[int]] | None, set_to_none: bool) -> None:
        """Drop the gradients of some slots of some buckets, or of all."""
        for bucket in self.order:
            indices = range(len(bucket.layout.slots)) if slots is None else slots.get(bucket, ())
            if indices:
                bucket.gradients.clear(indices, set_to_none)
        self.version += 1

    def _start_ready(self) -> None:
        """Start, in order, every reduction whose bucket is full. See [Note: the order of collectives]."""
        while self._next < len(self.order):
            bucket = self.order[self._next]
            if len(bucket.ready) < len(bucket.layout.slots):
                return
            self._start(bucket)
            self._next += 1

    def _start(self, bucket: TrainableBucket) -> None:
        """Start one reduction and finish the one before it."""
        with trace.phase("reduce-scatter", bucket.unit.name):
            bucket.gradients.start_reduce()
        self.drain()
        self._in_flight = bucket

    def _release(self) -> None:
        if self._finished is not None:
            self._finished.gradients.release()
            self._finished = None
