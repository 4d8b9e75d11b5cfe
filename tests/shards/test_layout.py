"""Index arithmetic for any parameters and up to 9 ranks: elements are covered once, aligned, and cut as they must."""

from __future__ import annotations

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zerolite.shards.layout import ALIGNMENT_NUMEL, BucketLayout, Packed, Range, Segment, align, pack

# The same examples on every segment, and no clock: the machine may be busy.
check = settings(
    deadline=None, derandomize=True, database=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)

SHAPES = st.lists(st.lists(st.integers(0, 9) | st.sampled_from([31, 32, 33]), max_size=2).map(tuple), max_size=12)
WORLDS = st.integers(1, 9)
BUCKETS = st.integers(1, 2000)


def packed(shapes: list[tuple[int, ...]], world: int, bucket_numel: int) -> list[BucketLayout]:
    return pack([(str(index), shape) for index, shape in enumerate(shapes)], world, bucket_numel)


def owners(layout: BucketLayout) -> list[int | None]:
    """Slot by element; None is padding. Fails where two slots overlap."""
    found: list[int | None] = [None] * layout.numel
    for index, slot in enumerate(layout.slots):
        for element in range(slot.offset, slot.range.stop):
            assert found[element] is None
            found[element] = index
    return found


@check
@given(SHAPES, WORLDS, BUCKETS)
def test_every_parameter_lies_once_in_order_and_aligned(shapes, world, bucket_numel):
    """Slots keep name, shape and order, start aligned, do not overlap and lie inside their bucket."""
    layouts = packed(shapes, world, bucket_numel)
    slots = [slot for layout in layouts for slot in layout.slots]
    assert [(slot.name, slot.shape) for slot in slots] == [(str(n), shape) for n, shape in enumerate(shapes)]
    for layout in layouts:
        owners(layout)
        assert all(slot.offset % ALIGNMENT_NUMEL == 0 for slot in layout.slots)
        assert all(slot.numel == math.prod(slot.shape) and slot.range.stop <= layout.numel for slot in layout.slots)


@check
@given(SHAPES, WORLDS, BUCKETS)
def test_buckets_hold_what_they_may(shapes, world, bucket_numel):
    """A bucket ends within its limit or holds one parameter, and the next parameter would not have fitted."""
    layouts = packed(shapes, world, bucket_numel)
    assert all(layout.slots for layout in layouts)
    for layout in layouts:
        assert layout.slots[-1].range.stop <= bucket_numel or len(layout.slots) == 1
    for layout, following in zip(layouts, layouts[1:], strict=False):
        assert align(layout.slots[-1].range.stop) + following.slots[0].numel > bucket_numel


@check
@given(SHAPES, WORLDS, BUCKETS)
def test_shards_are_equal_aligned_and_cover_the_bucket(shapes, world, bucket_numel):
    """The shards of all ranks follow each other from 0 to the bucket's end, each of the same, aligned length."""
    for layout in packed(shapes, world, bucket_numel):
        shards = [layout.shard_range(rank) for rank in range(world)]
        assert [start for start, _ in shards] == [0, *(stop for _, stop in shards[:-1])]
        assert shards[-1][1] == layout.numel == world * layout.shard_numel
        assert layout.shard_numel % ALIGNMENT_NUMEL == 0


@check
@given(SHAPES, WORLDS, BUCKETS)
def test_gaps_are_the_padding(shapes, world, bucket_numel):
    """Gaps are exactly the elements of no parameter, in order, and bounded by what alignment costs."""
    for layout in packed(shapes, world, bucket_numel):
        padding = [element for start, stop in layout.gaps for element in range(start, stop)]
        assert padding == [element for element, owner in enumerate(owners(layout)) if owner is None]
        assert all(start < stop for start, stop in layout.gaps)
        assert len(padding) == layout.padding_numel < ALIGNMENT_NUMEL * (len(layout.slots) + world)


@check
@given(SHAPES, WORLDS, BUCKETS, st.data())
def test_overlap_is_the_intersection(shapes, world, bucket_numel, data):
    """A slot's overlap with any range is the elements in both, and empty as start == stop inside the slot."""
    for layout in packed(shapes, world, bucket_numel):
        start = data.draw(st.integers(0, layout.numel))
        stop = data.draw(st.integers(start, layout.numel))
        for slot in layout.slots:
            first, last = slot.range.intersect(Range(start, stop))
            assert list(range(first, last)) == [e for e in range(slot.offset, slot.range.stop) if start <= e < stop]
            assert slot.offset <= first <= last <= slot.range.stop


@check
@given(SHAPES, WORLDS, BUCKETS)
def test_the_shards_of_all_ranks_hold_each_element_of_each_parameter_once(shapes, world, bucket_numel):
    """A parameter's overlaps with the ranks' shards follow each other and make up all of it."""
    for layout in packed(shapes, world, bucket_numel):
        for slot in layout.slots:
            parts = [slot.range.intersect(layout.shard_range(rank)) for rank in range(world)]
            elements = [element for first, last in parts for element in range(first, last)]
            assert elements == list(range(slot.offset, slot.range.stop))


KEYS = st.sampled_from(["a", "b", None])


@check
@given(SHAPES, WORLDS, BUCKETS, st.data())
def test_segments_cover_what_has_a_key_once_and_are_cut_at_shards(shapes, world, bucket_numel, data):
    """Each element with a key is in one segment of that key; a segment has no other's element and stays in a shard."""
    for layout in packed(shapes, world, bucket_numel):
        keys = data.draw(st.lists(KEYS, min_size=len(layout.slots), max_size=len(layout.slots)))
        owner = owners(layout)
        covered: dict[int, str] = {}
        for segment in layout.segments(layout.range, keys):
            assert segment.range.start < segment.range.stop
            assert (
                segment.range.stop - segment.range.start
            ) % ALIGNMENT_NUMEL == 0  # no kernel has a remainder to round in another way
            assert segment.range.start // layout.shard_numel == (segment.range.stop - 1) // layout.shard_numel
            for element in range(segment.range.start, segment.range.stop):
                assert element not in covered
                covered[element] = segment.key
        for element, index in enumerate(owner):
            if index is None:  # padding may lie inside a segment, between neighbours
                continue
            assert covered.get(element) == keys[index]


@check
@given(SHAPES, WORLDS, BUCKETS, st.data())
def test_segments_are_as_few_as_they_can_be(shapes, world, bucket_numel, data):
    """Two segments of one key in one shard have a parameter of another key, or none, between them."""
    for layout in packed(shapes, world, bucket_numel):
        keys = data.draw(st.lists(KEYS, min_size=len(layout.slots), max_size=len(layout.slots)))
        owner = owners(layout)
        segments = list(layout.segments(layout.range, keys))
        for segment, following in zip(segments, segments[1:], strict=False):
            assert segment.range.stop <= following.range.start
            if (
                segment.key == following.key
                and segment.range.start // layout.shard_numel == following.range.start // layout.shard_numel
            ):
                between = {owner[element] for element in range(segment.range.stop, following.range.start)} - {None}
                assert between and all(keys[index] != segment.key for index in between)


@check
@given(SHAPES, WORLDS, BUCKETS, st.data())
def test_who_owns_what_changes_no_segment(shapes, world, bucket_numel, data):
    """A rank that owns the whole bucket has the segments of those that own a shard each: stage 0 steps as 3 does."""
    for layout in packed(shapes, world, bucket_numel):
        keys = data.draw(st.lists(KEYS, min_size=len(layout.slots), max_size=len(layout.slots)))
        shards = [segment for rank in range(world) for segment in layout.segments(layout.shard_range(rank), keys)]
        assert list(layout.segments(layout.range, keys)) == shards


@check
@given(SHAPES, BUCKETS, st.tuples(WORLDS, WORLDS))
def test_the_world_size_moves_no_parameter(shapes, bucket_numel, worlds):
    """Buckets and offsets are those of any other world size; only the padding at a bucket's end differs."""
    one, other = (packed(shapes, world, bucket_numel) for world in worlds)
    assert [layout.slots for layout in one] == [layout.slots for layout in other]


@check
@given(st.integers(0, 10**12), st.integers(1, 10**6))
def test_align_is_the_next_multiple(numel, multiple):
    """align() gives the smallest multiple that is not below."""
    assert align(numel, multiple) % multiple == 0
    assert numel <= align(numel, multiple) < numel + multiple


@check
@given(st.lists(st.just((0,)) | st.just((3, 0)), min_size=1, max_size=5), WORLDS)
def test_a_bucket_of_nothing(shapes, world):
    """Zero-size parameters alone make one empty bucket without gaps or segments, and no division by zero."""
    (layout,) = packed(shapes, world, 100)
    assert layout.numel == layout.shard_numel == layout.padding_numel == 0
    assert list(layout.gaps) == [] and list(layout.segments(layout.range, ["a"] * len(shapes))) == []


def test_by_hand():
    """Three parameters on two ranks: offsets, padding and segments as worked out on paper."""
    (layout,) = pack([("w", (5, 10)), ("b", (3,)), ("v", (40,))], 2, 10_000)
    assert [slot.offset for slot in layout.slots] == [0, 128, 256] and layout.numel == 512  # 296, to a multiple of 256
    assert layout.shard_range(1) == (256, 512) and layout.padding_numel == 512 - 93
    assert list(layout.gaps) == [(50, 128), (131, 256), (296, 512)]
    assert list(layout.segments(layout.range, ["k", "k", "k"])) == [
        Segment(Range(0, 256), "k"),
        Segment(Range(256, 384), "k"),
    ]
    assert list(layout.segments(layout.range, ["k", None, "j"])) == [
        Segment(Range(0, 128), "k"),
        Segment(Range(256, 384), "j"),
    ]


@pytest.mark.parametrize("bucket_numel, sizes", [(130, [1, 1, 1]), (131, [2, 1]), (296, [3]), (1, [1, 1, 1])])
def test_bucket_limits_by_hand(bucket_numel, sizes):
    """The limit counts a bucket's elements up to its last parameter, alignment between them included."""
    layouts = pack([("w", (5, 10)), ("b", (3,)), ("v", (40,))], 2, bucket_numel)
    assert [len(layout.slots) for layout in layouts] == sizes


def test_ranks_with_unlike_parts_cut_buckets_at_the_same_parameters():
    """Of 7 columns one rank of tensor parallelism has 4 and one 3; they exchange a number a bucket."""
    parts = [[Packed(f"w{i}", (100, columns), largest_numel=400) for i in range(9)] for columns in (4, 3)]
    first, second = (pack(part, 2, 1100) for part in parts)
    assert [len(bucket.slots) for bucket in first] == [len(bucket.slots) for bucket in second]
    assert len(first) > 1
