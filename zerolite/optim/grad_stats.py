"""What all ranks must agree on before a step: the global gradient norm, and which parameters have a gradient."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from zerolite_kernels.cpu.command import NORM

from zerolite.errors import ZeroliteError
from zerolite.shards.grad_norm import add_up, exact_sum_of_squares, sum_of_squares


@dataclass(frozen=True)
class Verdict:
    """The same on every rank."""

    squares: list[float]  # a bucket, summed over ranks in rank order; of the gradients as they lie, loss scale included
    was_used: list[list[bool]]  # a bucket and slot: some rank has a gradient of it

    @property
    def norm(self) -> float:
        return math.sqrt(math.fsum(self.squares))

    @property
    def is_finite(self) -> bool:
        return math.isfinite(sum(self.squares))


def agree(zero, keys: Sequence[Sequence[bool | None]]) -> Verdict:
    """Norms and use over all ranks, after reducing gradients that some rank still holds unreduced. Collective.

    keys: a bucket of `zero.reduction_order` and slot: True where the slot counts, None where not.
    """
    buckets = zero.reduction_order
    verdict, unreduced = _exchange(zero, keys, sum_of_squares)
    if any(unreduced):
        zero.reduce_late([bucket for bucket, is_late in zip(buckets, unreduced, strict=True) if is_late])
        verdict, _ = _exchange(zero, keys, sum_of_squares)
    total = sum(verdict.squares)
    if total == 0 or not math.isfinite(total):
        verdict, _ = _exchange(zero, keys, exact_sum_of_squares)
    return verdict


def _exchange(zero, keys, squares_of) -> tuple[Verdict, list[bool]]:
    """One small all-gather: [digest of gathers], then a bucket's [squares, has unreduced, used slots ...]."""
    numbers: list[torch.Tensor | float] = [float(zero.gather_digest)]
    for bucket, bucket_keys in zip(zero.reduction_order, keys, strict=True):
        gradients = bucket.gradients
        squares: torch.Tensor | float = 0.0
        if bucket.flat.is_on_host:
            squares = _squares_on_host(zero, bucket, bucket_keys, squares_of)
        elif gradients.reduced is not None:
            low, high = bucket.layout.piece(zero.shard_group.rank)
            for run in bucket.layout.runs(low, high, bucket_keys):
                mine = gradients.reduced[run.start - gradients.start : run.stop - gradients.start]
                squares = squares + squares_of(mine, run.start - low)
        numbers += [squares, float(gradients.has_unreduced), *map(float, gradients.was_used)]
    facts = torch.tensor([float("nan") if isinstance(n, torch.Tensor) else n for n in numbers], dtype=torch.float64)
    facts = facts.to(zero.device.device)
    where = [i for i, number in enumerate(numbers) if isinstance(number, torch.Tensor)]
    if where:
        facts[torch.tensor(where, device=facts.device)] = torch.stack([numbers[i] for i in where])
    replicas = zero.gather_facts(facts).tolist()

    if len({row[0] for replica in replicas for row in replica}) > 1:
        raise ZeroliteError(
            "ranks gathered other parameters, or in another order, since the last step: at stage 3 every rank must run "
            "the same modules in the same order; use a lower stage, or units= whose choice does not depend on the data"
        )
    zero.gather_digest = 0
    squares, unreduced, was_used = [], [], []
    column = 1
    for bucket in zero.reduction_order:
        num_slots = len(bucket.layout.slots)
        squares.append(sum(row[column] for row in replicas[0]))
        rows = [row[column + 1 : column + 2 + num_slots] for replica in replicas for row in replica]
        unreduced.append(any(row[0] for row in rows))
        was_used.append([any(row[1 + index] for row in rows) for index in range(num_slots)])
        column += 2 + num_slots
    return Verdict(squares, was_used), unreduced


def _squares_on_host(zero, bucket, keys, squares_of) -> torch.Tensor | float:
    """Of this rank's piece: what came down with the gradient or, where other slots count, what the workers sum."""
    gradients = bucket.gradients
    if not gradients.has_reduced:
        return 0.0
    if gradients.squares is not None and all(keys) and squares_of is sum_of_squares:
        return gradients.squares
    held = gradients.on_host()
    runs = list(bucket.layout.runs(*bucket.layout.piece(zero.shard_group.rank), keys))
    return sum(map(add_up, bucket.flat.host.sums(NORM, runs, held)), 0.0)


def slot_norms(zero) -> dict[str, float]:
    """Norms of the trainable parameters' reduced gradients, by name; 0 where there is none. Collective."""
    names, squares = [], []
    for bucket in zero.reduction_order:
        gradients = bucket.gradients
        held = None
        if gradients.has_reduced:
            held = gradients.on_host().values if bucket.flat.is_on_host else gradients.reduced
        low, high = bucket.layout.piece(zero.shard_group.rank)
        for slot in bucket.layout.slots:
            first, last = bucket.layout.overlap(slot, low, high)
            mine = None if held is None else held[first - gradients.start : last - gradients.start].double()
            names.append(slot.name)
            squares.append(0.0 if mine is None else float(mine.square().sum()))
    totals = zero.gather_facts(torch.tensor(squares, dtype=torch.float64))[0].sum(dim=0)
    return dict(zip(names, totals.sqrt().tolist(), strict=True))
