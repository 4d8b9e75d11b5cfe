"""Blocks of tensors: where a part of a parameter that is split over ranks lies in the whole one.

Pure index arithmetic on row-major tensors. A run of consecutive elements of a block is no run of the whole tensor, but
it is cut into a few blocks that are: whole rows, and what is left at both ends, dimension by dimension.
"""

import math
from collections.abc import Iterator
from operator import le
from typing import TYPE_CHECKING, NamedTuple

from zerolite.shards.layout import Range

if TYPE_CHECKING:
    import torch  # for types alone: `zerolite inspect` answers without it


class Block(NamedTuple):
    """Elements [offset, offset + length) along every dimension of a tensor."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(offset + length for offset, length in zip(self.offsets, self.shape, strict=True))

    def intersect(self, other: "Block") -> "Block | None":
        """The elements that lie in both; None where there are none."""
        starts = tuple(map(max, self.offsets, other.offsets))
        ends = map(min, self.ends, other.ends)
        shape = tuple(end - start for start, end in zip(starts, ends, strict=True))
        return None if any(length <= 0 for length in shape) else Block(starts, shape)

    def of(self, flat: "torch.Tensor", within: "Block") -> "torch.Tensor":
        """A view of these elements of a 1D tensor that holds the block `within`, row by row."""
        view = flat.view(within.shape)
        for dim, (start, length, origin) in enumerate(zip(self.offsets, self.shape, within.offsets, strict=True)):
            view = view.narrow(dim, start - origin, length)
        return view

    def is_inside(self, shape: tuple[int, ...]) -> bool:
        """Whether it is a block of a tensor of this shape."""
        if not len(self.offsets) == len(self.shape) == len(shape):
            return False
        return min((*self.offsets, *self.shape, 0)) == 0 and all(map(le, self.ends, shape))


def whole(shape: tuple[int, ...]) -> Block:
    return Block((0,) * len(shape), tuple(shape))


def runs(block: Block, elements: Range) -> Iterator[tuple[Range, Block]]:
    """Cut elements of a flattened block into blocks of the whole tensor, each a run of those elements, in order."""
    if elements.numel <= 0:
        return
    if not block.shape:
        yield elements, block
        return
    row_numel = math.prod(block.shape[1:])
    first, last = -(-elements.start // row_numel), elements.stop // row_numel
    if first > last:  # inside one row
        yield from _of_row(block, last, row_numel, elements)
        return
    if elements.start < first * row_numel:
        yield from _of_row(block, first - 1, row_numel, Range(elements.start, first * row_numel))
    if first < last:
        offsets = (block.offsets[0] + first, *block.offsets[1:])
        yield Range(first * row_numel, last * row_numel), Block(offsets, (last - first, *block.shape[1:]))
    if last * row_numel < elements.stop:
        yield from _of_row(block, last, row_numel, Range(last * row_numel, elements.stop))


def _of_row(block: Block, row: int, row_numel: int, elements: Range) -> Iterator[tuple[Range, Block]]:
    """`runs` of elements that lie in one row along the first dimension."""
    start, index = row * row_numel, block.offsets[0] + row
    inner = Block(block.offsets[1:], block.shape[1:])
    for part, found in runs(inner, Range(elements.start - start, elements.stop - start)):
        yield Range(part.start + start, part.stop + start), Block((index, *found.offsets), (1, *found.shape))


def copy(out: "torch.Tensor", to: tuple[Block, Range], source: "torch.Tensor", of: tuple[Block, Range]) -> int:
    """Copy what two runs of one tensor's blocks have in common; how many elements that is.

    out, source (numel,): the elements `Range` of the flattened `Block`, each.
    """
    num_copied = 0
    for target, target_block in runs(*to):
        for given, given_block in runs(*of):
            common = target_block.intersect(given_block)
            if common is not None:
                own = common.of(target.of(out, to[1]), target_block)
                own.copy_(common.of(given.of(source, of[1]), given_block))
                num_copied += common.numel
    return num_copied
