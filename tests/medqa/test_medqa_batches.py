"""The order of rows depends on the seed and the rows alone; ranks and accumulation only divide it."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from zerolite.medqa.batches import Order, collate, fingerprint, micro_batches
from zerolite.medqa.prompts import IGNORED, Example

lengths = st.lists(st.integers(1, 50), min_size=1, max_size=300)


@given(lengths, st.integers(1, 16), st.integers(0, 5), st.integers(0, 3))
def test_every_row_once_an_epoch(lengths, global_batch_rows, seed, epoch):
    order = Order(lengths, global_batch_rows, seed)
    batches = order.epoch(epoch)
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
    assert len(batches) == order.steps_per_epoch
    sizes = sorted((len(batch) for batch in batches), reverse=True)
    assert all(size == global_batch_rows for size in sizes[:-1]) and 0 < sizes[-1] <= global_batch_rows
    again = Order(lengths, global_batch_rows, seed).epoch(epoch)
    assert all((a == b).all() for a, b in zip(batches, again, strict=True))


@given(lengths, st.sampled_from([(1, 8, 1), (1, 4, 2), (2, 4, 1), (2, 2, 2), (4, 1, 2), (8, 1, 1)]), st.integers(0, 5))
def test_ranks_and_accumulation_divide_the_same_batches(lengths, division, seed):
    world_size, batch_rows, accumulation = division
    order = Order(lengths, world_size * batch_rows * accumulation, seed)
    reference = Order(lengths, 8, seed)
    for rows, expected in zip(order.epoch(1), reference.epoch(1), strict=True):
        parts = [micro_batches(rows, rank, world_size, batch_rows) for rank in range(world_size)]
        assert len({len(part) for part in parts}) == 1  # as many collectives on every rank
        assert len(parts[0]) <= accumulation
        assert all(len(micro_batch) <= batch_rows for part in parts for micro_batch in part)
        assert sorted(row for part in parts for micro in part for row in micro) == sorted(expected)


@given(lengths, st.integers(1, 8), st.integers(0, 40), st.integers(0, 40))
def test_a_position_is_a_step(lengths, global_batch_rows, first, num_more):
    order = Order(lengths, global_batch_rows, seed=1)
    whole = list(order.steps(0, first + num_more))
    resumed = list(order.steps(first, first + num_more))
    assert [step for step, _ in resumed] == list(range(first, first + num_more))
    assert all((a == b).all() for (_, a), (_, b) in zip(whole[first:], resumed, strict=True))


def test_rows_of_a_batch_have_like_lengths_and_epochs_differ():
    rng = np.random.default_rng(0)
    row_lengths = rng.integers(1, 500, 2000).tolist()
    order = Order(row_lengths, 8, seed=3)
    spread = np.mean([np.ptp(order.lengths[batch]) for batch in order.epoch(0)])
    assert spread < 0.1 * np.mean([np.ptp(rng.choice(row_lengths, 8)) for _ in range(250)])
    first, second = (order.epoch(epoch)[0].tolist() for epoch in (0, 1))
    assert first != second and first != Order(row_lengths, 8, seed=4).epoch(0)[0].tolist()


def example(*ids: int) -> Example:
    labels = [IGNORED] + list(ids[1:])
    return Example(np.array(ids, np.int32), np.array(labels, np.int32))


def test_collate_pads_on_the_right():
    batch = collate([example(5, 6, 7), example(8, 9)], pad_token_id=2)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED, 9, IGNORED]]
    empty = collate([], pad_token_id=2)
    assert empty["input_ids"].shape == (1, 1) and (empty["labels"] == IGNORED).all()
    assert all(tensor.dtype == torch.int64 for tensor in [*batch.values(), *empty.values()])


def test_fingerprint_sees_every_token_and_label():
    base = [example(1, 2, 3), example(4, 5)]
    others = [base[::-1], base[:1], [example(1, 2), example(3, 4, 5)], [example(1, 2, 4), example(4, 5)]]
    changed = Example(base[0].input_ids, np.array([IGNORED] * 3, np.int32))
    prints = {fingerprint(examples) for examples in [base, *others, [changed, base[1]]]}
    assert len(prints) == 6 and fingerprint(list(base)) in prints
