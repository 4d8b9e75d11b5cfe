"""Adam over sharded parameters."""

from zerolite.optim.base import ShardedOptimizer
from zerolite.optim.hyperparameters import check_hyperparameters, check_torch_options
from zerolite.optim.rules import AdamRule


class Adam(ShardedOptimizer):
    """Adam (Kingma & Ba 2015, algorithm 1), with weight decay as an L2 term of the gradient; else as `AdamW`."""

    rule = AdamRule()

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        *,
        max_grad_norm: float | None = None,
        **torch_options,
    ):
        check_torch_options("Adam", torch_options, self.rule.is_decoupled)
        check_hyperparameters(lr, betas, eps, weight_decay)
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay), max_grad_norm)
