"""The four optimizers that users build: torch.optim's arguments, plus `max_grad_norm`."""

import torch
from zerolite_kernels.cpu.command import PREPARE

from zerolite.optim.base import ShardedOptimizer
from zerolite.optim.rules import AdamRule, AdamWRule, LambRule, LionRule, trust_ratio
from zerolite.shards.grad_norm import add_up


class AdamW(ShardedOptimizer):
    """AdamW on this rank's range of the parameters. Collective: every rank must build and call it alike.

    params: parameters or param groups of a model that `zerolite.shard` has sharded.
    max_grad_norm: clip the global norm in `step`; None: do not.
    """

    rule = AdamWRule()

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, *, max_grad_norm: float | None = None
    ):
        _check(lr, betas, eps, weight_decay)
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay), max_grad_norm)


class Adam(ShardedOptimizer):
    """Adam, with weight decay as an L2 term of the gradient; else as `AdamW`."""

    rule = AdamRule()

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, *, max_grad_norm: float | None = None
    ):
        _check(lr, betas, eps, weight_decay)
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay), max_grad_norm)


class Lion(ShardedOptimizer):
    """Lion: half of Adam's states; take a learning rate 3 to 10 times smaller than AdamW's. Else as `AdamW`."""

    rule = LionRule()

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, *, max_grad_norm: float | None = None):
        _check(lr, betas, 0.0, weight_decay)
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay), max_grad_norm)


class Lamb(ShardedOptimizer):
    """LAMB: Adam's direction with a trust ratio a parameter, whole parameters though the states are sharded."""

    rule = LambRule()

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, *, max_grad_norm: float | None = None
    ):
        _check(lr, betas, eps, weight_decay)
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay), max_grad_norm)
        self._ratios: dict[object, list[float]] = {}  # bucket -> a slot's trust ratio, in this step

    def _prepare(self, work, multiplier):
        """Update all moments, then agree on every parameter's trust ratio in one small all-gather."""
        sums = []
        for bucket, keys in work:
            # A row a piece, so that the order of summation does not depend on who owns which pieces.
            flat, piece_numel = bucket.flat, bucket.layout.piece_numel
            rows = torch.zeros(bucket.layout.world_size, len(keys), 2, dtype=torch.float64, device=flat.device.device)
            if flat.is_on_host:
                runs = list(bucket.layout.runs(flat.start, flat.stop, keys))
                numbers = [self._numbers(bucket, run.key, multiplier) for run in runs]
                held = bucket.gradients.on_host()
                states = self._host_states[bucket]
                for run, entries in zip(runs, flat.host.sums(PREPARE, runs, held, states, numbers), strict=True):
                    rows[run.start // piece_numel, run.key.index] += torch.tensor(
                        [add_up(entries[0::2]), add_up(entries[1::2])], dtype=torch.float64
                    ).to(rows.device)
            else:
                for chunk in self._chunks(bucket, keys):
                    part = self.rule.prepare(self._run(bucket, chunk, multiplier))
                    rows[chunk.start // piece_numel, chunk.key.index] += part
            sums.append(rows)
        zero = self._zero
        flat = torch.cat([rows.view(-1) for rows in sums]) if sums else torch.zeros(0, dtype=torch.float64)
        if not all(bucket.flat.owns_all for bucket, _ in work):
            flat = zero.shard_group.gather_facts(flat).sum(dim=0)  # a piece's row is zero on all ranks but its owner's
        numbers = flat.tolist()
        offset = 0
        for (bucket, keys), rows in zip(work, sums, strict=True):
            table = torch.tensor(numbers[offset : offset + rows.numel()], dtype=torch.float64).view(rows.shape)
            offset += rows.numel()
            totals = [sum(table[piece][index] for piece in range(len(table))) for index in range(len(keys))]
            self._ratios[bucket] = [trust_ratio(*total.tolist()) for total in totals]

    def _extra(self, bucket, key):
        return {"trust_ratio": self._ratios[bucket][key.index]}


def _check(lr, betas, eps, weight_decay) -> None:
    """ValueError as torch.optim's constructors raise it."""
    if not lr >= 0:
        raise ValueError(f"lr is a number of at least 0, got {lr}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas are two numbers in [0, 1), got {betas}")
    if not eps >= 0:
        raise ValueError(f"eps is a number of at least 0, got {eps}")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay is a number of at least 0, got {weight_decay}")
