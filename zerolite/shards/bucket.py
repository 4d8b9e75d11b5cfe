"""A bucket and a unit: what is reduced together, and what is gathered and freed together."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from zerolite.runtime import trace
from zerolite.shards.gradients import FlatGradients
from zerolite.shards.layout import BucketLayout, Slot
from zerolite.shards.parameters import FlatParameters
from zerolite.shards.shard import Shard
from zerolite.shards.units import ParameterGroup


@dataclass(eq=False)
class Bucket:
    """Some parameters of one unit, all trainable or all frozen, that move as one flat buffer."""

    unit: "Unit"
    group: ParameterGroup  # that its parameters were planned in
    position: int  # of its first parameter, in the model's order
    parameters: FlatParameters
    shard: Shard
    gradients: FlatGradients | None  # None where it is frozen
    ready: set[int] = field(default_factory=set)  # slots whose gradient came, or cannot come any more, in this backward

    def __post_init__(self):
        self.layout: BucketLayout = self.parameters.layout

    @property
    def communicates(self) -> bool:
        """Whether unsharded parameters come from other ranks, or from workers, after a step."""
        return not (self.parameters.stays_unsharded and self.shard.spec.owns_all)

    def slots(self) -> Iterator[tuple[Slot, nn.Parameter]]:
        return zip(self.layout.slots, self.parameters.tensors, strict=True)


@dataclass(eq=False)
class TrainableBucket(Bucket):
    """A bucket whose parameters get gradients."""

    gradients: FlatGradients


class Unit:
    """Parameters that are gathered and freed together, around the forward and the backward of one module."""

    def __init__(self, name: str, module: nn.Module, index: int, is_root: bool):
        self.name = name
        self.module = module
        self.index = index  # in `Engine.units`
        self.is_root = is_root
        self.buckets: list[Bucket] = []
        self.communicates = False  # some bucket does
        self.forward_depth = 0  # forwards of the module that are running now
        self.backward_uses = 0  # of the module, begun and not ended, in this backward
        self.end_forward = self.end_backward = trace.nothing  # ends the unit's flight in the trace
        self.pending_uses = 0  # forwards whose backward has not ended; a hint only, a graph may be dropped

    def add(self, bucket: Bucket) -> None:
        self.buckets.append(bucket)
        self.communicates |= bucket.communicates

    def unshard(self) -> bool:
        """Start gathering what is sharded; whether anything was started. Collective."""
        return any([bucket.parameters.unshard() for bucket in self.buckets])

    def wait(self) -> None:
        for bucket in self.buckets:
            bucket.parameters.wait()

    def reshard(self) -> None:
        for bucket in self.buckets:
            bucket.parameters.reshard()
