"""AdamW over sharded parameters."""

from zerolite.optim.base import ShardedOptimizer
from zerolite.optim.hyperparameters import check_hyperparameters, check_torch_options
from zerolite.optim.rules import AdamWRule


class AdamW(ShardedOptimizer):
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) on this rank's range of the parameters.

    Collective: every rank must build it, step it and clip with it alike. Arguments as of torch.optim.AdamW.

    params: parameters or param groups of a model that `zerolite.shard` has sharded.
    max_grad_norm: clip the global norm in `step`; None: do not.
    torch_options: `fused` and `foreach`, which change no number here; the others of torch's where they are off.
    Raises ValueError for a hyperparameter out of its range, for an option that zerolite has not (amsgrad, maximize,
    capturable, differentiable), here and in a param group, and for parameters of no or of several sharded models.
    """

    rule = AdamWRule()

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=1e-2,
        *,
        max_grad_norm: float | None = None,
        **torch_options,
    ):
        check_torch_options("AdamW", torch_options, self.rule.is_decoupled)
        check_hyperparameters(lr, betas, eps, weight_decay)
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay), max_grad_norm)
