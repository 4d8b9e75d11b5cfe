"""Rows of an evaluation over ranks: batches are made before they are divided, so no number depends on the ranks."""

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from zerolite.medqa.processes import Processes

T = TypeVar("T")


def of_like_length(lengths: Sequence[int], batch_rows: int) -> list[list[int]]:
    """Row numbers in batches of at most `batch_rows` rows of similar lengths."""
    rows = np.argsort(np.asarray(lengths), kind="stable").tolist()
    return [rows[start : start + batch_rows] for start in range(0, len(rows), batch_rows)]


def on_ranks(
    items: Sequence[T],
    lengths: Sequence[int],
    batch_rows: int,
    work: Callable[[list[T]], list[Any]],
    ranks: Processes,
    told: str,
) -> list[Any]:
    """What `work` gives for each item, in order, on every rank. Every rank must call it.

    work: given a batch of items of like `lengths`, one result (of JSON) for each. Batch i is rank i % N's. Each rank
    makes as many calls, since at stage 3 a call is a collective: one without a batch repeats the last one in vain.
    told: what is counted on stderr.
    """
    batches = of_like_length(lengths, batch_rows)
    found: list[Any] = [None] * len(items)
    shown = tqdm(range(0, len(batches), ranks.world_size), desc=told, disable=ranks.rank != 0, mininterval=2)
    mine: list[tuple[int, Any]] = []
    for first in shown:
        number = first + ranks.rank
        rows = batches[min(number, len(batches) - 1)]
        results = work([items[row] for row in rows])
        if number < len(batches):
            mine += zip(rows, results, strict=True)
    for row, result in (pair for part in gathered(mine, ranks) for pair in part):
        found[row] = result
    return found


def gathered(value: Any, ranks: Processes) -> list[Any]:
    """The value of each rank, in rank order, through JSON. Every rank must call it."""
    if ranks.world_size == 1:
        return [json.loads(json.dumps(value))]
    mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(ranks.device)
    sizes = [int(row[0]) for row in ranks.gather(len(mine))]
    padded = torch.nn.functional.pad(mine, (0, max(sizes) - len(mine)))
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return [json.loads(bytes(part[:size].tolist())) for part, size in zip(parts, sizes, strict=True)]
