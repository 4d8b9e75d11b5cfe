"""Do the elements of a part of a tensor lie in the whole one where the arithmetic of blocks says?"""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zerolite.shards.blocks import Block, copy, runs, whole
from zerolite.shards.layout import Range

# The same examples every time, and no clock: the machine may be busy.
check = settings(deadline=None, derandomize=True, database=None, max_examples=100)

SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@st.composite
def blocks(draw, shape: tuple[int, ...]) -> tuple[Block, Range]:
    """A block of a tensor of this shape, and a range of its flattened elements, either perhaps empty."""
    ends = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
    block = Block(tuple(a for a, _ in ends), tuple(b - a for a, b in ends))
    return block, Range(*sorted(draw(st.integers(0, block.numel)) for _ in range(2)))


@st.composite
def two_parts(draw):
    shape = draw(SHAPES)
    return shape, draw(blocks(shape)), draw(blocks(shape))


def elements(shape: tuple[int, ...], block: Block, part: Range) -> torch.Tensor:
    """Indices in the whole tensor, by slicing, which the arithmetic must agree with."""
    index = torch.arange(math.prod(shape)).view(shape)
    for dim, (offset, length) in enumerate(zip(*block, strict=True)):
        index = index.narrow(dim, offset, length)
    return index.reshape(-1)[part.start : part.stop]


@check
@given(two_parts())
def test_runs_are_blocks_of_the_whole_tensor_in_order(drawn):
    shape, (block, part), _ = drawn
    found = list(runs(block, part))
    assert [run.start for run, _ in found] == [part.start, *(run.stop for run, _ in found)][: len(found)]
    assert sum(run.numel for run, _ in found) == part.numel
    for run, one in found:
        assert one.numel == run.numel and one.is_inside(shape)
        assert torch.equal(elements(shape, one, Range(0, one.numel)), elements(shape, block, run))
    assert len(found) <= max(1, 2 * len(shape) - 1)


@check
@given(two_parts())
def test_what_two_parts_have_in_common_is_copied_and_nothing_else(drawn):
    shape, to, of = drawn
    wanted, given_elements = elements(shape, *to), elements(shape, *of)
    out = torch.full((wanted.numel(),), -1)
    num_copied = copy(out, to, given_elements.clone(), of)
    common = torch.isin(wanted, given_elements)
    assert torch.equal(out, torch.where(common, wanted, -1)) and num_copied == int(common.sum())


@check
@given(two_parts())
def test_blocks_intersect_where_they_share_elements(drawn):
    shape, (first, _), (second, _) = drawn
    shared = set(elements(shape, first, Range(0, first.numel)).tolist())
    shared &= set(elements(shape, second, Range(0, second.numel)).tolist())
    common = first.intersect(second)
    assert (common is None) == (not shared)
    if common is not None:
        assert set(elements(shape, common, Range(0, common.numel)).tolist()) == shared
    assert whole(shape).intersect(whole(shape)) == whole(shape) and first.is_inside(shape)
