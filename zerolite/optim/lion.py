"""Lion over sharded parameters."""

from zerolite.optim.base import ShardedOptimizer
from zerolite.optim.hyperparameters import check_hyperparameters
from zerolite.optim.rules import LionRule


class Lion(ShardedOptimizer):
    """Lion (Chen et al. 2023, algorithm 2): half of Adam's states. Else as `AdamW`.

    Its learning rate is 3 to 10 times smaller than AdamW's.
    """

    rule = LionRule()

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, *, max_grad_norm: float | None = None):
        check_hyperparameters(lr, betas, 0.0, weight_decay)
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay), max_grad_norm)
