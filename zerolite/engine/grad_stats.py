"""Grad stats: what all ranks exchange before a step. The global gradient norm, and which parameters have a gradient."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from zerolite.engine import norm_over, step_header
from zerolite.engine.step_header import Told
from zerolite.shards.bucket import Bucket, TrainableBucket
from zerolite.shards.grad_norm import exact_sum_of_squares

if TYPE_CHECKING:
    from zerolite.engine.engine import Engine


@dataclass(frozen=True)
class GradStats:
    """The same on every rank."""

    squares: list[float]  # a bucket, summed over ranks in rank order; of the gradients as they lie, loss scale included
    was_used: list[list[bool]]  # a bucket and slot: some rank has a gradient of it
    of_all_stages: float | None = None  # squares, where there are other pipeline stages: norm_over.py

    @property
    def total(self) -> float:
        """Squares of this rank's pipeline stage; Inf or NaN where one of them is."""
        total = sum(self.squares)
        return math.fsum(self.squares) if math.isfinite(total) else total

    @property
    def norm(self) -> float:
        return math.sqrt(math.fsum(self.squares) if self.of_all_stages is None else self.of_all_stages)

    @property
    def is_finite(self) -> bool:
        return math.isfinite(sum(self.squares) if self.of_all_stages is None else self.of_all_stages)


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


def reduce_grad_stats(engine: "Engine", counts: Sequence[Sequence[bool | None]], told: Told | None = None) -> GradStats:
    """Norms and use over all ranks, after reducing gradients that some rank still holds unreduced. Collective.

    counts: a bucket of `engine.reducer.order` and slot: True where the slot counts, None where not.
    told: of the optimizer that steps, which every rank must have alike.
    ZeroliteError on every rank where that differs, where ranks have gathered other units since the last step, or in
    another order, and where they have scaled gradients by other factors.
    """
    header = step_header.numbers_of(engine, told) if engine.mesh.tensor else []
    stats, unreduced = _exchange(engine, counts, told, is_exact=False)
    if any(unreduced):
        _reduce_late(engine, unreduced)
        stats, _ = _exchange(engine, counts, told, is_exact=False)
    total = sum(stats.squares)
    if total == 0 or not math.isfinite(total):
        stats, _ = _exchange(engine, counts, told, is_exact=True)
    return norm_over.over_parts(engine, stats, header, told) if engine.mesh.tensor else stats


def _exchange(
    engine: "Engine", counts: Sequence[Sequence[bool | None]], told: Told | None, is_exact: bool
) -> tuple[GradStats, list[bool]]:
    """One small all-gather: a `BucketStats` a bucket. Collective.

    The stats, and for each bucket whether some rank has unreduced gradients.
    """
    buckets = engine.reducer.order
    numbers: list[torch.Tensor | float] = []
    for bucket, bucket_counts in zip(buckets, counts, strict=True):
        gradients = bucket.gradients
        squares = bucket.shard.sum_of_squares(bucket_counts, is_exact)
        numbers += BucketStats(squares, gradients.has_unreduced, gradients.was_used).pack()
    replicas = _gather_rows(engine, told, numbers)
    sums: list[float] = []
    unreduced: list[bool] = []
    was_used: list[list[bool]] = []
    column = 0
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


def slot_squares(engine: "Engine") -> dict[Bucket, list[float]]:
    """A bucket's and slot's sum of squares of the reduced gradient over all ranks, unscaled; 0 where there is none.

    One small all-gather, after reducing gradients that some rank still holds unreduced. Collective.
    ZeroliteError as of `reduce_grad_stats`.
    """
    buckets = engine.reducer.order
    rows, unreduced = _exchange_slots(engine)
    if any(unreduced):
        _reduce_late(engine, unreduced)
        rows, _ = _exchange_slots(engine)
    found: list[list[float]] = []
    column = 0
    for bucket in buckets:
        end = column + len(bucket.layout.slots)
        found.append([sum(terms) for terms in zip(*(row[column:end] for row in rows), strict=True)])
        column = end
    if engine.mesh.tensor:
        found = norm_over.over_tensor_groups(engine, buckets, found)
    return dict(zip(buckets, found, strict=True))


def _exchange_slots(engine: "Engine") -> tuple[list[list[float]], list[bool]]:
    """A row of one replica's rank: squares of its shard of every slot; a bucket: is it unreduced? Collective."""
    buckets = engine.reducer.order
    numbers: list[torch.Tensor | float] = [float(bucket.gradients.has_unreduced) for bucket in buckets]
    for bucket in buckets:
        numbers += _slot_squares(bucket)
    replicas = _gather_rows(engine, None, numbers)
    everyone = [row for replica in replicas for row in replica]
    unreduced = [any(row[index] for row in everyone) for index in range(len(buckets))]
    return [row[len(buckets) :] for row in replicas[0]], unreduced


def _slot_squares(bucket: TrainableBucket) -> list[torch.Tensor | float]:
    """fp64 sums of squares of this rank's shard of each slot's gradient."""
    gradient, spec = bucket.shard.gradient(), bucket.shard.spec
    if gradient is None:
        return [0.0] * len(bucket.layout.slots)
    shard = spec.shard_range
    parts = [slot.range.intersect(shard) for slot in bucket.layout.slots]
    return [exact_sum_of_squares(part.of(gradient, spec.range), part.start - shard.start) for part in parts]


def slot_norms(engine: "Engine") -> dict[str, float]:
    """Norms of the trainable parameters' reduced gradients, by name; 0 where there is none. Collective."""
    return {
        slot.name: math.sqrt(squares)
        for bucket, row in slot_squares(engine).items()
        for slot, squares in zip(bucket.layout.slots, row, strict=True)
    }


def _reduce_late(engine: "Engine", unreduced: Sequence[bool]) -> None:
    """Reduce the buckets that some rank has not reduced. Collective."""
    order = engine.reducer.order
    engine.reducer.reduce_late([bucket for bucket, is_late in zip(order, unreduced, strict=True) if is_late])


def _gather_rows(
    engine: "Engine", told: Told | None, numbers: Sequence[torch.Tensor | float]
) -> list[list[list[float]]]:
    """Every rank's numbers, by replica and shard, once ranks have compared what must be alike. Collective."""
    header = step_header.header_of(engine, told)
    replicas = engine.all_gather_scalars(_as_tensor([*header, *numbers], engine.device.device)).tolist()
    step_header.compare_headers(engine, told, [row[: len(header)] for replica in replicas for row in replica])
    return [[row[len(header) :] for row in replica] for replica in replicas]
