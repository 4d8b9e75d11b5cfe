"""Index arithmetic: parameters -> buckets -> each rank's piece -> the runs that an optimizer steps.

Pure functions and frozen values: no tensors, no processes. Offsets and counts are elements.

A bucket is the flat concatenation of some parameters of one unit. It is cut into `world_size` equal pieces, one a
rank; the piece is what a rank owns at stages 1 to 3. Parameters start at multiples of ALIGNMENT_NUMEL so that views
are aligned for kernels, and pieces have a multiple of it so that collectives are.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

ALIGNMENT_NUMEL = 128  # 256 bytes of bf16; a block of int8 states, so that no block belongs to two parameters


@dataclass(frozen=True)
class Slot:
    """Where one parameter lies in its bucket: [offset, offset + numel)."""

    name: str
    shape: tuple[int, ...]
    numel: int
    offset: int

    @property
    def stop(self) -> int:
        return self.offset + self.numel


@dataclass(frozen=True)
class Run:
    """Elements [start, stop) of a bucket, inside one piece, that share `key`."""

    start: int
    stop: int
    key: Hashable


@dataclass(frozen=True)
class BucketLayout:
    """Parameters of one bucket and its cut into pieces; `numel` includes padding."""

    slots: tuple[Slot, ...]
    numel: int
    world_size: int

    @property
    def piece_numel(self) -> int:
        return self.numel // self.world_size

    @property
    def padding_numel(self) -> int:
        return self.numel - sum(slot.numel for slot in self.slots)

    @property
    def name(self) -> str:
        """Its parameters, for errors."""
        names = dict.fromkeys((self.slots[0].name, self.slots[-1].name))
        return " ... ".join(names)

    def piece(self, rank: int) -> tuple[int, int]:
        """[start, stop) of a rank's piece."""
        return rank * self.piece_numel, (rank + 1) * self.piece_numel

    def gaps(self) -> Iterator[tuple[int, int]]:
        """The padding: every [start, stop) that no parameter covers."""
        end = 0
        for slot in self.slots:
            if slot.offset > end:
                yield end, slot.offset
            end = max(end, slot.stop)
        if self.numel > end:
            yield end, self.numel

    def overlap(self, slot: Slot, start: int, stop: int) -> tuple[int, int]:
        """The part of `slot` inside [start, stop) of the bucket, in elements of the bucket; empty: start == stop."""
        first = min(max(slot.offset, start), slot.stop)
        return first, max(first, min(slot.stop, stop))

    def runs(self, start: int, stop: int, keys: Sequence[Hashable | None]) -> Iterator[Run]:
        """Cut [start, stop) at pieces and slots, merge neighbours of equal key; a slot whose key is None is left out.

        A run takes the padding behind its last slot along (zeros, which every rule leaves zeros), so that its length is
        a multiple of ALIGNMENT_NUMEL and no vectorised kernel has a remainder loop: that rounds differently, and where
        an element lies would show in its bits. The cut at pieces does not depend on who owns what, so a rank that owns
        the whole bucket (stage 0) and ranks that own a piece each run the same kernels on the same elements.
        """
        for rank in range(start // self.piece_numel if self.piece_numel else 0, self.world_size):
            low, high = self.piece(rank)
            if low >= stop:
                return
            run: Run | None = None
            for slot, key in zip(self.slots, keys, strict=True):
                first, last = self.overlap(slot, low, high)
                if first == last:
                    continue
                last = min(align(last), high)
                if run is not None and run.key == key and key is not None:
                    run = Run(run.start, last, key)
                    continue
                if run is not None and run.key is not None:
                    yield run
                run = Run(first, last, key)
            if run is not None and run.key is not None:
                yield run


def align(numel: int, multiple: int = ALIGNMENT_NUMEL) -> int:
    return -(-numel // multiple) * multiple


def pack(parameters: Sequence[tuple[str, tuple[int, ...]]], world_size: int, bucket_numel: int) -> list[BucketLayout]:
    """Pack (name, shape) in order into buckets of at most `bucket_numel`; a larger parameter has one to itself."""
    buckets: list[BucketLayout] = []
    slots: list[Slot] = []
    end = 0

    def close() -> None:
        nonlocal slots, end
        if slots:
            buckets.append(BucketLayout(tuple(slots), align(end, ALIGNMENT_NUMEL * world_size), world_size))
        slots, end = [], 0

    for name, shape in parameters:
        numel = 1
        for length in shape:
            numel *= length
        if slots and end + numel > bucket_numel:
            close()
        slots.append(Slot(name, tuple(shape), numel, end))
        end = align(end + numel)
    close()
    return buckets
