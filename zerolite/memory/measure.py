"""Bytes that model states take on this rank now, counted from live tensors."""

from dataclasses import dataclass

import torch
from torch import nn

from zerolite.engine.engine import engine_of
from zerolite.optim.base import ShardedOptimizer
from zerolite.shards.layout import BucketLayout, Range


@dataclass(frozen=True)
class Usage:
    """Bytes on this rank, padding included: unique storages of live tensors, not a formula.

    A gathered unit counts as parameters, an unreduced gradient as gradients.
    """

    parameters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int  # fp32 master copies and the optimizer's states
    padding_bytes: int  # of the three together, what alignment and division by the world size cost
    host_bytes: int = 0  # offloaded: gradients, parameters, masters, states, and what workers need beside
    file_bytes: int = 0  # offloaded to a drive


def measure(model: nn.Module, optimizer: ShardedOptimizer | None = None) -> Usage:
    """Count this rank's model states now; `gradients_bytes` is largest at the end of backward. Not collective.

    optimizer: without it the states in `optimizer_bytes` are left out, fp32 masters are counted all the same.
    Raises ValueError for a model that is not sharded.
    """
    engine = engine_of(model)
    counts = {"parameters": _Count(), "gradients": _Count(), "optimizer": _Count()}
    for unit in engine.units:
        for bucket in unit.buckets:
            layout, owned = bucket.layout, bucket.shard.range
            counts["parameters"].add(bucket.parameters.unsharded, layout, layout.range)
            for kind, tensor, covered in bucket.shard.device_tensors():
                counts[kind].add(tensor, layout, covered)
            for values in optimizer.resident_states(bucket) if optimizer is not None else ():
                counts["optimizer"].add(values, layout, owned)
            if bucket.gradients is not None and bucket.gradients.local is not None:
                counts["gradients"].add(bucket.gradients.local, layout, layout.range)
    return Usage(
        counts["parameters"].total_bytes,
        counts["gradients"].total_bytes,
        counts["optimizer"].total_bytes,
        sum(count.padding_bytes for count in counts.values()),
        engine.placement.host_bytes,
        engine.placement.file_bytes,
    )


class _Count:
    def __init__(self):
        self.total_bytes = 0
        self.padding_bytes = 0
        self._seen: set[int] = set()

    def add(self, tensor: torch.Tensor, layout: BucketLayout, covered: Range) -> None:
        """Count a tensor that covers a range of a bucket, unless its storage was counted or is freed."""
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0 or storage._cdata in self._seen:
            return
        self._seen.add(storage._cdata)
        self.total_bytes += storage.nbytes()
        used = sum(slot.range.intersect(covered).numel for slot in layout.slots)
        self.padding_bytes += (covered.numel - used) * tensor.element_size()
