"""LAMB over sharded parameters."""

from dataclasses import replace

import torch

from zerolite.engine.norm_over import over_tensor_groups
from zerolite.optim.base import ShardedOptimizer, Work
from zerolite.optim.hyperparameters import check_hyperparameters
from zerolite.optim.rules import LambRule, trust_ratio


class Lamb(ShardedOptimizer):
    """LAMB (You et al. 2020, algorithm 2): Adam's direction with a trust ratio a parameter. Else as `AdamW`.

    A ratio is of the whole parameter, though the states are sharded.
    """

    rule: LambRule = LambRule()

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, *, max_grad_norm: float | None = None
    ):
        check_hyperparameters(lr, betas, eps, weight_decay)
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay), max_grad_norm)

    def _prepare(self, work: list[Work]) -> None:
        """Update all moments, then set every parameter's trust ratio, from one small all-gather."""
        states = self._table.buckets
        squares = [
            bucket.shard.prepare(self.rule, states[bucket].states, updates, len(keys)) for bucket, keys, updates in work
        ]
        for (_, _, updates), rows in zip(work, self._sum_over_ranks(work, squares), strict=True):
            # Rows are added one after the other: the order of summation does not depend on who owns which shards.
            totals = [sum(shard[slot] for shard in rows) for slot in range(rows.shape[1])]
            ratios = [trust_ratio(*total.tolist()) for total in totals]
            updates[:] = [replace(update, trust_ratio=ratios[update.slot]) for update in updates]

    def _sum_over_ranks(self, work: list[Work], squares: list[torch.Tensor]) -> list[torch.Tensor]:
        """Each bucket's (world_size, slots, 2) on the host, a shard's row from the rank that owns it. Collective."""
        flat = torch.cat([rows.view(-1) for rows in squares]) if squares else torch.zeros(0, dtype=torch.float64)
        if not all(bucket.shard.spec.owns_all for bucket, _, _ in work):
            # A shard's row is zero on all ranks but its owner's.
            flat = self._engine.mesh.shard.all_gather_scalars(flat).sum(dim=0)
        parts = list(flat.cpu().split([rows.numel() for rows in squares]))
        if self._engine.mesh.tensor:
            # A shard's row is of other elements on a rank with another part: only sums over shards are added.
            sums = [part.view(rows.shape).sum(dim=0).view(-1) for part, rows in zip(parts, squares, strict=True)]
            added = over_tensor_groups(self._engine, [bucket for bucket, _, _ in work], [one.tolist() for one in sums])
            return [
                torch.tensor(one, dtype=torch.float64).view(1, *rows.shape[1:])
                for one, rows in zip(added, squares, strict=True)
            ]
        return [part.view(rows.shape) for part, rows in zip(parts, squares, strict=True)]
