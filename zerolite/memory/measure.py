"""Bytes that model states take on this rank now, counted from live tensors."""

from dataclasses import dataclass

import torch
from torch import nn

from zerolite.api import engine_of
from zerolite.optim.base import ShardedOptimizer
from zerolite.shards.layout import BucketLayout


@dataclass(frozen=True)
class Usage:
    """Bytes on this rank, padding included: unique storages of live tensors, not a formula.

    A gathered unit counts as parameters, a gradient that no reduction has taken yet as gradients.
    """

    parameters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int  # fp32 master copies and the optimizer's states
    padding_bytes: int  # of the three together, what alignment and division by the world size cost
    host_bytes: int = 0  # offloaded: gradients, parameters, masters, states, and what workers need beside
    file_bytes: int = 0  # offloaded to a drive


def measure(model: nn.Module, optimizer: ShardedOptimizer | None = None) -> Usage:
    """Count this rank's model states now; `gradients_bytes` is largest at the end of backward. Not collective."""
    zero = engine_of(model)
    parameters, gradients, states = _Count(), _Count(), _Count()
    for unit in zero.units:
        for bucket in unit.buckets:
            flat, layout = bucket.flat, bucket.layout
            owned = (flat.start, flat.stop)
            parameters.add(flat.full, layout, 0, layout.numel)
            if not flat.streams:
                parameters.add(flat.owned, layout, *owned)
            if flat.master is not None:
                states.add(flat.master, layout, *owned)
            if optimizer is not None:
                for values in optimizer.states_of(bucket).values():
                    states.add(values, layout, *owned)
            if bucket.gradients is not None:
                gradients.add(bucket.gradients.local, layout, 0, layout.numel)
                gradients.add(bucket.gradients.whole, layout, 0, layout.numel)
                gradients.add(bucket.gradients.reduced, layout, *owned)
    padding = parameters.padding_bytes + gradients.padding_bytes + states.padding_bytes
    host = zero.host
    return Usage(
        parameters.total_bytes,
        gradients.total_bytes,
        states.total_bytes,
        padding,
        host.arena.nbytes if host is not None else 0,
        host.states_bytes if host is not None else 0,
    )


class _Count:
    def __init__(self):
        self.total_bytes = 0
        self.padding_bytes = 0
        self._seen: set[int] = set()

    def add(self, tensor: torch.Tensor | None, layout: BucketLayout, start: int, stop: int) -> None:
        """Count a tensor that covers [start, stop) of a bucket, unless its storage was counted or is freed."""
        if tensor is None:
            return
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0 or storage.data_ptr() in self._seen:
            return
        self._seen.add(storage.data_ptr())
        self.total_bytes += storage.nbytes()
        overlaps = [layout.overlap(slot, start, stop) for slot in layout.slots]
        covered = sum(last - first for first, last in overlaps)
        self.padding_bytes += (stop - start - covered) * tensor.element_size()
