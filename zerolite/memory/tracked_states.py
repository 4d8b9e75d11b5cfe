"""Model states of a running engine by kind, brought up to date unit by unit, since a step asks hundreds of times."""

from collections.abc import Iterator

import torch

from zerolite.engine.engine import Engine
from zerolite.memory.state_bytes import buffer_bytes, fixed_bytes, fixed_tensors, gradient_bytes, kept_gradient_bytes
from zerolite.optim.base import ShardedOptimizer
from zerolite.shards.bucket import TrainableBucket


class TrackedStates:
    """Bytes on this rank's device, by the functions that a plan counts with."""

    fixed: dict[str, int]  # "parameters", "master" and "moments" that stay
    gathered_bytes: int  # of units that are gathered for a while
    gradients_bytes: int  # that shards keep until the step
    buffers_bytes: int  # of gradients on their way to their shards

    def __init__(self, engine: Engine, optimizer: ShardedOptimizer):
        self.engine, self.optimizer = engine, optimizer
        self.buckets = [bucket for unit in engine.units for bucket in unit.buckets]
        self._of_unit: dict[str, list[TrainableBucket]] = {}
        for bucket in engine.reducer.order:
            self._of_unit.setdefault(bucket.unit.name, []).append(bucket)
        self._gathered: dict[int, int] = {}  # storage -> bytes, of what is gathered and freed
        self._own: dict[TrainableBucket, tuple[int, int]] = {}  # kept, on its way
        self._kept_bytes = self._moving_bytes = 0
        self._moving: set[TrainableBucket] = set()
        self.refresh()

    def tensors(self) -> Iterator[torch.Tensor]:
        """Whatever is counted here and lives now; the buffers of units that are freed, too."""
        yield from (tensor for _, tensor in fixed_tensors(self.buckets, self.optimizer.resident_states))
        for bucket in self.buckets:
            yield bucket.parameters.unsharded
        for bucket in self.engine.reducer.order:
            yield from bucket.gradients.buffers()
            yield from (tensor for kind, tensor, _ in bucket.shard.device_tensors() if kind == "gradients")

    def refresh(self) -> None:
        """Count everything anew."""
        self.fixed = fixed_bytes(self.buckets, self.optimizer.resident_states)
        self.fixed_total_bytes = sum(self.fixed.values())
        freed = [bucket.parameters.unsharded for bucket in self.buckets if not bucket.parameters.stays_unsharded]
        self._gathered = {one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in freed}
        self.gathered_bytes = sum(self._gathered.values())
        for bucket in self.engine.reducer.order:
            self._count(bucket)
        self._add_up()

    def refresh_unit(self, name: str) -> None:
        """Count the gradients of one unit anew, and those that were on their way."""
        for bucket in {*self._of_unit.get(name, ()), *self._moving}:
            self._count(bucket)
        self._add_up()

    def resized(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        """A unit was gathered or freed, if the storage is one of them."""
        if storage._cdata in self._gathered:
            self.gathered_bytes += nbytes - self._gathered[storage._cdata]
            self._gathered[storage._cdata] = nbytes

    def at_end_of_backward(self) -> dict[str, int]:
        """Model states by kind, as `plan.states` has them and `measure` counts them."""
        self.refresh()
        order = self.engine.reducer.order
        local = sum(bucket.gradients.local.nbytes for bucket in order if bucket.gradients.local is not None)
        return {**self.fixed, "gradients": sum(map(gradient_bytes, order)) + local}

    def _count(self, bucket: TrainableBucket) -> None:
        kept, moving = self._own.get(bucket, (0, 0))
        now = self._own[bucket] = kept_gradient_bytes(bucket), buffer_bytes(bucket)
        self._kept_bytes += now[0] - kept
        self._moving_bytes += now[1] - moving
        # One refresh longer: between the end of its reduction and its shard's gradient a bucket has neither.
        (self._moving.add if now[1] or moving else self._moving.discard)(bucket)

    def _add_up(self) -> None:
        self.gradients_bytes = self._kept_bytes
        self.buffers_bytes = self._moving_bytes + self.engine.reducer.pool.nbytes
