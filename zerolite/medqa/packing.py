"""Packing: several rows in one sequence, where no token sees another row; the losses are those of the rows alone."""

from __future__ import annotations

import bisect
import dataclasses
import inspect
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from zerolite.medqa.arguments import Options
from zerolite.medqa.batches import Order, collate
from zerolite.medqa.corpus import Corpus
from zerolite.medqa.loss import label_loss
from zerolite.medqa.tokens import IGNORED, Example

# Losses of one row may differ by so much of themselves: beside other tokens, and behind a row of another length.
SAME_SHAPE = 1e-5
OTHER_SHAPE = {torch.float64: 1e-5, torch.float32: 1e-4}
OTHER_SHAPE_16_BITS = 1e-2


def pack(data: Corpus, options: Options) -> Corpus:
    """The corpus with its training rows in sequences of at most `cutoff_len` tokens, and what that saves told."""
    sequences = packed(data.train, options.cutoff_len)
    rows, batch_rows = len(data.train), options.per_device_train_batch_size
    before, after = (_padding(examples, batch_rows, options.seed) for examples in (data.train, sequences))
    told = (
        f"packed: {rows} rows in {len(sequences)} sequences of at most {options.cutoff_len} tokens; padding is "
        f"{after:.1%} of the tokens read in micro-batches of {batch_rows}, {before:.1%} without --packing"
    )
    return dataclasses.replace(data, train=sequences, summary=f"{data.summary}\n{told}")


def packed(examples: Sequence[Example], length: int) -> list[Example]:
    """The examples in sequences of at most `length` tokens, by best fit, the longest first. Each row is in one.

    It depends on the rows and their order alone: a resumed run packs the same.
    """
    lengths = [len(example.input_ids) for example in examples]
    rooms: list[int] = []  # sorted: free tokens that some sequence has
    with_room: dict[int, list[list[int]]] = {}  # free tokens: rows of the sequences that have so many
    for row in sorted(range(len(examples)), key=lambda row: (-lengths[row], row)):
        at = bisect.bisect_left(rooms, lengths[row])
        room, rows = length, []
        if at < len(rooms):
            room = rooms[at]
            rows = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        rows.append(row)
        left = max(room - lengths[row], 0)
        if left not in with_room:
            bisect.insort(rooms, left)
            with_room[left] = []
        with_room[left].append(rows)
    sequences = sorted(sorted(rows) for sequences in with_room.values() for rows in sequences)
    return [_joined([examples[row] for row in rows]) for rows in sequences]


def _joined(examples: list[Example]) -> Example:
    starts = np.cumsum([0, *(len(example.input_ids) for example in examples)])[:-1]
    labels = np.concatenate([example.labels for example in examples])
    labels[starts] = IGNORED  # the last token of one row does not predict the first one of the next
    ids = np.concatenate([example.input_ids for example in examples])
    return Example(ids, labels, starts=tuple(starts.tolist()))


def _padding(examples: Sequence[Example], batch_rows: int, seed: int) -> float:
    """Part of an epoch's tokens that is padding."""
    order = Order([len(example.input_ids) for example in examples], batch_rows, seed)
    read = sum(len(rows) * int(order.lengths[rows].max()) for rows in order.epoch(0))
    return 1 - int(order.lengths.sum()) / read


@torch.no_grad()
def check(model: nn.Module) -> None:
    """Ask the model whether it keeps the rows of a sequence apart: four forward passes over a few tokens.

    Raises ValueError where its losses of a row depend on what stands before it. Every rank must call it.
    """
    name = type(model).__name__
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        raise ValueError(f"--packing: {name} takes no position_ids, so each row cannot begin at position 0")
    draw = np.random.default_rng(0)
    num_ids = model.config.get_text_config().vocab_size
    row, before, other, longer = (draw.integers(num_ids, size=size, dtype=np.int32) for size in (16, 7, 7, 12))
    learned = Example(row, np.where(np.arange(len(row)) > 0, row, IGNORED).astype(np.int32))
    training = [module for module in model.modules() if module.training]
    model.eval()  # no dropout: nothing is drawn
    try:
        alone, behind, beside, later = (
            label_loss(model, collate([_behind(ids, learned)], pad_token_id=0)).item()
            for ids in (None, before, other, longer)
        )
    except (TypeError, ValueError, LookupError, RuntimeError) as error:
        raise ValueError(f"--packing: {name} does not take packed rows: {type(error).__name__}: {error}") from error
    finally:
        for module in training:
            module.training = True
    if abs(behind - beside) > SAME_SHAPE * abs(alone):
        raise ValueError(f"--packing: {name} lets tokens of one row see another row: train without it")
    dtype = next(model.parameters()).dtype
    if abs(later - alone) > OTHER_SHAPE.get(dtype, OTHER_SHAPE_16_BITS) * abs(alone):
        raise ValueError(f"--packing: in {name} a row's loss depends on where it stands: train without it")


def _behind(ids: np.ndarray | None, row: Example) -> Example:
    """`row` behind a row without loss."""
    return row if ids is None else _joined([Example(ids, np.full(len(ids), IGNORED, np.int32)), row])
