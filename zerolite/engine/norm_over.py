"""Grad stats over the ranks that have other parts of the model: of DTensor parameters, and other pipeline stages.

The ranks of other data have compared and added up before (grad_stats.py); what is exchanged here are those sums.
Squares of split buckets are added, of whole ones counted once. Every rank comes to the same number, by the same
additions.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from zerolite.engine import step_header
from zerolite.engine.step_header import Told
from zerolite.shards.bucket import Bucket

if TYPE_CHECKING:
    from zerolite.engine.engine import Engine
    from zerolite.engine.grad_stats import GradStats

# Whole parameters have equal gradients on the ranks that split others, up to what a GPU adds up in another order.
UNLIKE, NEGLIGIBLE = 1e-5, 1e-6


def over_parts(engine: Engine, stats: GradStats, header: Sequence[float], told: Told | None) -> GradStats:
    """The stats of whole parameters. Collective over the ranks of tensor parallelism.

    ZeroliteError on every rank of them where their headers differ; a warning where gradients of whole parameters do.
    """
    buckets = engine.reducer.order
    for one in engine.mesh.tensor:
        flags = [float(flag) for row in stats.was_used for flag in row]
        numbers = torch.tensor([*header, *stats.squares, *flags], dtype=torch.float64)
        rows = one.group.all_gather_scalars(numbers.to(engine.device.device)).tolist()
        start = len(header)
        step_header.compare_headers(engine, told, [row[:start] for row in rows], _Group(one.group, engine))
        middle = start + len(buckets)
        by_bucket = list(zip(*(row[start:middle] for row in rows), strict=True))
        squares = [_total(one.splits(b.group.splits), terms) for b, terms in zip(buckets, by_bucket, strict=True)]
        _warn_of_parts(one.splits, buckets, by_bucket, math.fsum(squares))
        used = iter([any(column) for column in zip(*(row[middle:] for row in rows), strict=True)])
        stats = replace(stats, squares=squares, was_used=[[next(used) for _ in row] for row in stats.was_used])
    return stats


def over_tensor_groups(engine: Engine, buckets: Sequence[Bucket], rows_of: list[list[float]]) -> list[list[float]]:
    """A row of numbers a bucket: of split buckets their sums over ranks, of whole ones what they are. Collective."""
    for one in engine.mesh.tensor:
        numbers = torch.tensor([number for row in rows_of for number in row], dtype=torch.float64)
        ranks = one.group.all_gather_scalars(numbers.to(engine.device.device)).tolist()
        columns = iter(zip(*ranks, strict=True))
        rows_of = [
            [_total(one.splits(bucket.group.splits), next(columns)) for _ in row]
            for bucket, row in zip(buckets, rows_of, strict=True)
        ]
    return rows_of


def over_stages(engine: Engine, stats: GradStats, before: GradStats) -> tuple[GradStats, GradStats]:
    """Both with the total over all pipeline stages. Collective over them."""
    totals = [stats.total, before.total]
    for group in engine.mesh.pipeline:
        numbers = torch.tensor(totals, dtype=torch.float64, device=engine.device.device)
        totals = [sum(column) for column in zip(*group.all_gather_scalars(numbers).tolist(), strict=True)]
    return replace(stats, of_all_stages=totals[0]), replace(before, of_all_stages=totals[1])


class _Group:
    """The ranks of one group, as `Ranks` of rank_settings.py."""

    def __init__(self, group, engine: Engine):
        self.group, self.device = group, engine.device.device

    def all_gather_scalars(self, scalars: torch.Tensor) -> torch.Tensor:
        """Collective."""
        return self.group.all_gather_scalars(scalars.to(self.device))


def _total(is_split: bool, terms: Sequence[float]) -> float:
    if is_split:
        return sum(terms)
    return next((term for term in terms if not math.isfinite(term)), terms[0])


def _warn_of_parts(splits, buckets: Sequence[Bucket], by_bucket, total: float) -> None:
    for bucket, terms in zip(buckets, by_bucket, strict=True):
        low, high = min(terms), max(terms)
        if not splits(bucket.group.splits) and high - low > UNLIKE * high and high > NEGLIGIBLE * total:
            warnings.warn(
                f"gradients of {bucket.layout.name}, which every rank of tensor parallelism has whole, differ between "
                "them: a module of theirs sees another part of the input on each, and the parameters will drift apart. "
                "Put it into the plan of parallelize_module (SequenceParallel() for norms)",
                stacklevel=8,
            )
