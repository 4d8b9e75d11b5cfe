"""Index arithmetic: parameters -> buckets -> each rank's shard -> the segments that an optimizer steps.

Pure functions and frozen values: no tensors of its own, no processes. Offsets and counts are elements.

A bucket is the flat concatenation of some parameters of one unit. It is cut into `world_size` equal shards, one a
rank. Parameters start at multiples of ALIGNMENT_NUMEL so that views are aligned for kernels, and shards have a multiple
of it so that collectives are. A `Partition` turns the stage into the range that a rank owns.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch  # for types alone: `zerolite inspect` answers without it

    from zerolite.shards.blocks import Block

ALIGNMENT_NUMEL = 128  # 256 bytes of bf16; a block of int8 states, so that no block belongs to two parameters


class Range(NamedTuple):
    """Elements [start, stop) of a bucket; empty where start == stop."""

    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start

    def intersect(self, other: "Range") -> "Range":
        """The part of this range that lies in `other`; where there is none, an empty range inside this one."""
        start = min(max(self.start, other.start), self.stop)
        return Range(start, max(start, min(self.stop, other.stop)))

    def relative_to(self, origin: "Range") -> "Range":
        """The same elements, counted from the start of `origin`."""
        return Range(self.start - origin.start, self.stop - origin.start)

    def of(self, tensor: "torch.Tensor", within: "Range | None" = None) -> "torch.Tensor":
        """A view of these elements of a 1D tensor that holds the range `within` of the bucket; None: all of it."""
        origin = within.start if within is not None else 0
        return tensor[self.start - origin : self.stop - origin]


@dataclass(frozen=True)
class Slot:
    """Where one parameter lies in its bucket: [offset, offset + numel)."""

    name: str
    shape: tuple[int, ...]
    numel: int
    offset: int
    block: "Block | None" = None  # of the whole parameter, where other ranks have other parts of it
    whole_shape: tuple[int, ...] | None = None  # then

    @cached_property
    def range(self) -> Range:
        return Range(self.offset, self.offset + self.numel)


class Segment(NamedTuple):
    """Elements of a bucket, inside one shard, that share `key` and are stepped alike."""

    range: Range
    key: Any


@dataclass(frozen=True)
class BucketLayout:
    """Parameters of one bucket and its cut into shards; `numel` includes padding."""

    slots: tuple[Slot, ...]
    numel: int
    world_size: int

    @property
    def range(self) -> Range:
        return Range(0, self.numel)

    @cached_property
    def shard_numel(self) -> int:
        return self.numel // self.world_size

    @property
    def padding_numel(self) -> int:
        return self.numel - sum(slot.numel for slot in self.slots)

    @cached_property
    def name(self) -> str:
        """Its parameters, for errors."""
        names = dict.fromkeys((self.slots[0].name, self.slots[-1].name))
        return " ... ".join(names)

    def shard_range(self, rank: int) -> Range:
        return Range(rank * self.shard_numel, (rank + 1) * self.shard_numel)

    def shard_ranges(self, within: Range) -> Iterator[Range]:
        """The shards that `within`, a whole number of them, is made of."""
        for start in range(within.start, within.stop, self.shard_numel or 1):
            yield Range(start, start + self.shard_numel)

    @cached_property
    def gaps(self) -> tuple[Range, ...]:
        """The padding: every range that no parameter covers."""
        found, end = [], 0
        for slot in self.slots:
            if slot.offset > end:
                found.append(Range(end, slot.offset))
            end = max(end, slot.range.stop)
        if self.numel > end:
            found.append(Range(end, self.numel))
        return tuple(found)

    def segments(self, within: Range, keys: Sequence[Hashable | None]) -> Iterator[Segment]:
        """Cut `within` at shards and slots, merge neighbours of equal key; a slot whose key is None is left out.

        A segment includes the padding behind its last slot (zeros, which every rule leaves zeros), so that its length
        is a multiple of ALIGNMENT_NUMEL and no vectorised kernel has a remainder loop: that rounds differently, and
        where an element lies would show in its bits. The cut at shards does not depend on who owns what, so a rank that
        owns the whole bucket (stage 0) and ranks that own a shard each run the same kernels on the same elements.
        """
        for rank in range(within.start // self.shard_numel if self.shard_numel else 0, self.world_size):
            shard = self.shard_range(rank)
            if shard.start >= within.stop:
                return
            segment: Segment | None = None
            for slot, key in zip(self.slots, keys, strict=True):
                start, stop = slot.range.intersect(shard)
                if start == stop:
                    continue
                stop = min(align(stop), shard.stop)
                if segment is not None and segment.key == key and key is not None:
                    segment = Segment(Range(segment.range.start, stop), key)
                    continue
                if segment is not None and segment.key is not None:
                    yield segment
                segment = Segment(Range(start, stop), key)
            if segment is not None and segment.key is not None:
                yield segment


@dataclass(frozen=True)
class Partition:
    """What a stage shards. The only place that asks for the stage: all else asks these methods.

    stage   a rank steps     whole gradients stay   parameters stay unsharded
    0       the bucket       yes                    yes
    1       its shard        yes                    yes
    2       its shard        no                     yes
    3       its shard        no                     no (adapters: yes)
    """

    stage: int

    def __post_init__(self):
        if self.stage not in (0, 1, 2, 3) or isinstance(self.stage, bool):
            raise ValueError(f"stage is 0, 1, 2 or 3, got {self.stage!r}")

    @property
    def shards_parameters(self) -> bool:
        return self.stage == 3

    @property
    def shards_gradients(self) -> bool:
        return self.stage >= 2

    def owned_range(self, layout: BucketLayout, rank: int) -> Range:
        """What a rank owns and steps."""
        return layout.range if self.stage == 0 else layout.shard_range(rank)

    def owned_numel(self, layout: BucketLayout) -> int:
        return layout.numel if self.stage == 0 else layout.shard_numel


def align(numel: int, multiple: int = ALIGNMENT_NUMEL) -> int:
    return -(-numel // multiple) * multiple


class Packed(NamedTuple):
    """One parameter that `pack` is given."""

    name: str
    shape: tuple[int, ...]  # of this rank's part
    block: "Block | None" = None  # as of a Slot, with `whole_shape`
    whole_shape: tuple[int, ...] | None = None
    largest_numel: int = 0  # that any rank has of it: buckets are cut alike where parts differ


def pack(parameters: Sequence[tuple], world_size: int, bucket_numel: int) -> list[BucketLayout]:
    """Pack `Packed`, or (name, shape), in order into buckets of at most `bucket_numel`.

    A parameter that is larger has one to itself.
    """
    buckets: list[BucketLayout] = []
    slots: list[Slot] = []
    end = largest_end = 0

    def close() -> None:
        nonlocal slots, end, largest_end
        if slots:
            buckets.append(BucketLayout(tuple(slots), align(end, ALIGNMENT_NUMEL * world_size), world_size))
        slots, end, largest_end = [], 0, 0

    for name, shape, block, whole_shape, largest in (Packed(*parameter) for parameter in parameters):
        numel = 1
        for length in shape:
            numel *= length
        if slots and largest_end + max(numel, largest) > bucket_numel:
            close()
        slots.append(Slot(name, tuple(shape), numel, end, block, whole_shape))
        end, largest_end = align(end + numel), align(largest_end + max(numel, largest))
    close()
    return buckets
