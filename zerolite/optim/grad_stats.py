"""Grad stats: what all ranks exchange before a step. The global gradient norm, and which parameters have a gradient."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from zerolite.engine.engine import Engine
from zerolite.optim import step_header
from zerolite.optim.step_header import StepSettings
from zerolite.shards.bucket import Bucket


@dataclass(frozen=True)
class GradStats:
    """The same on every rank."""

    squares: list[float]  # a bucket, summed over ranks in rank order; of the gradients as they lie, loss scale included
    was_used: list[list[bool]]  # a bucket and slot: some rank has a gradient of it

    @property
    def norm(self) -> float:
        return math.sqrt(math.fsum(self.squares))

    @property
    def is_finite(self) -> bool:
        return math.isfinite(sum(self.squares))


class BucketStats(NamedTuple):
    """One rank's word on one bucket."""

    squares: torch.Tensor | float  # () fp64, of this rank's shard of the reduced gradient
    has_unreduced: bool
    was_used: Sequence[bool]  # a slot: it has a gradient

    def pack(self) -> list[torch.Tensor | float]:
        return [self.squares, float(self.has_unreduced), *map(float, self.was_used)]

    @classmethod
    def width(cls, num_slots: int) -> int:
        return 2 + num_slots

    @classmethod
    def unpack(cls, row: Sequence[float]) -> "BucketStats":
        return cls(row[0], bool(row[1]), [bool(number) for number in row[2:]])


def reduce_grad_stats(
    engine: Engine, counts: Sequence[Sequence[bool | None]], settings: StepSettings | None = None
) -> GradStats:
    """Norms and use over all ranks, after reducing gradients that some rank still holds unreduced. Collective.

    counts: a bucket of `engine.reducer.order` and slot: True where the slot counts, None where not.
    settings: of the optimizer that steps, which every rank must have alike.
    ZeroliteError on every rank where they differ, or where ranks have run other backwards or gathered other units since
    the last step, or in another order.
    """
    buckets = engine.reducer.order
    stats, unreduced = _exchange(engine, counts, settings, is_exact=False)
    if any(unreduced):
        engine.reducer.reduce_late([bucket for bucket, is_late in zip(buckets, unreduced, strict=True) if is_late])
        stats, _ = _exchange(engine, counts, settings, is_exact=False)
    total = sum(stats.squares)
    if total == 0 or not math.isfinite(total):
        stats, _ = _exchange(engine, counts, settings, is_exact=True)
    return stats


def _exchange(
    engine: Engine, counts: Sequence[Sequence[bool | None]], settings: StepSettings | None, is_exact: bool
) -> tuple[GradStats, list[bool]]:
    """One small all-gather: the header, then a `BucketStats` a bucket. Collective.

    The stats, and for each bucket whether some rank has unreduced gradients.
    """
    buckets = engine.reducer.order
    numbers: list[torch.Tensor | float] = step_header.header_of(engine, settings)
    for bucket, bucket_counts in zip(buckets, counts, strict=True):
        gradients = bucket.gradients
        squares = bucket.shard.sum_of_squares(bucket_counts, is_exact)
        numbers += BucketStats(squares, gradients.has_unreduced, gradients.was_used).pack()
    replicas = engine.all_gather_scalars(_as_tensor(numbers, engine.device.device)).tolist()

    headers = [row[: step_header.WIDTH] for replica in replicas for row in replica]
    step_header.compare_headers(engine, settings, headers)
    sums: list[float] = []
    unreduced: list[bool] = []
    was_used: list[list[bool]] = []
    column = step_header.WIDTH
    for bucket in buckets:
        end = column + BucketStats.width(len(bucket.layout.slots))
        ranks = [[BucketStats.unpack(row[column:end]) for row in replica] for replica in replicas]
        sums.append(sum(float(rank.squares) for rank in ranks[0]))
        everyone = [rank for replica in ranks for rank in replica]
        unreduced.append(any(rank.has_unreduced for rank in everyone))
        was_used.append([any(flags) for flags in zip(*(rank.was_used for rank in everyone), strict=True)])
        column = end
    return GradStats(sums, was_used), unreduced


def _as_tensor(numbers: list[torch.Tensor | float], device: torch.device) -> torch.Tensor:
    """(n,) fp64 on the device; 0-dim tensors are put in there, so that the host does not wait for them.

    Nor for the copies: the driver has staged memory that is not pinned when the call returns.
    """
    packed = torch.tensor([math.nan if isinstance(n, torch.Tensor) else n for n in numbers], dtype=torch.float64)
    packed = packed.to(device, non_blocking=True)
    tensors = {index: number for index, number in enumerate(numbers) if isinstance(number, torch.Tensor)}
    if tensors:
        packed[torch.tensor(list(tensors)).to(device, non_blocking=True)] = torch.stack(list(tensors.values()))
    return packed


def slot_norms(engine: Engine) -> dict[str, float]:
    """Norms of the trainable parameters' reduced gradients, by name; 0 where there is none. Collective."""
    names: list[str] = []
    squares: list[float] = []
    for bucket in engine.reducer.order:
        names += [slot.name for slot in bucket.layout.slots]
        squares += _slot_squares(bucket)
    totals = engine.all_gather_scalars(torch.tensor(squares, dtype=torch.float64))[0].sum(dim=0)
    return dict(zip(names, totals.sqrt().tolist(), strict=True))


def _slot_squares(bucket: Bucket) -> list[float]:
    """Sums of squares of this rank's shard of each slot's gradient."""
    gradient, spec = bucket.shard.gradient(), bucket.shard.spec
    if gradient is None:
        return [0.0] * len(bucket.layout.slots)
    parts = [slot.range.intersect(spec.shard_range).of(gradient, spec.range) for slot in bucket.layout.slots]
    return [float(part.double().square().sum()) for part in parts]
