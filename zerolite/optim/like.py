"""zerolite's optimizer for one of torch's: the same param groups, so that what was built on them goes on working."""

import functools

import torch

from zerolite.optim.adam import Adam
from zerolite.optim.adamw import AdamW
from zerolite.optim.base import ShardedOptimizer


def like(torch_optimizer: torch.optim.Optimizer, *, max_grad_norm: float | None = None) -> ShardedOptimizer:
    """The sharded optimizer of an AdamW or Adam of torch that has not stepped. Collective where a zerolite.AdamW is.

    It has the same param-group dicts, in the same list: learning-rate schedulers that were built on `torch_optimizer`
    steer it, and groups that are added to one are in both. `torch_optimizer` itself cannot step.

    max_grad_norm: clip the global norm in `step`; None: do not.
    Raises TypeError for another optimizer. Raises ValueError for one that has stepped, has hooks, or has options that
    zerolite has not (amsgrad, maximize, capturable, differentiable), and for parameters of no sharded model.
    """
    kind = type(torch_optimizer)
    if kind not in (torch.optim.AdamW, torch.optim.Adam):
        raise TypeError(
            f"like takes a torch.optim.AdamW or torch.optim.Adam, got {kind.__module__}.{kind.__name__}: build "
            "zerolite's Adam, AdamW, Lamb or Lion from the model's parameters"
        )
    if torch_optimizer.state:
        raise ValueError(
            f"this {kind.__name__} has stepped, and its states are of whole parameters: call like before its first "
            "step, or load a zerolite checkpoint into the new optimizer"
        )
    if torch_optimizer._optimizer_step_pre_hooks or torch_optimizer._optimizer_step_post_hooks:
        raise ValueError(f"this {kind.__name__} has step hooks: register them on the optimizer that like returns")
    groups = torch_optimizer.param_groups
    is_decoupled = {bool(group.get("decoupled_weight_decay", kind is torch.optim.AdamW)) for group in groups}
    if len(is_decoupled) > 1:
        raise ValueError("some param groups have decoupled_weight_decay and some have not: build two optimizers")
    rule = AdamW if is_decoupled.pop() else Adam
    hyper = {name: torch_optimizer.defaults[name] for name in ("lr", "betas", "eps", "weight_decay")}
    optimizer = rule(groups, **hyper, max_grad_norm=max_grad_norm)
    torch_optimizer.param_groups = optimizer.param_groups
    torch_optimizer.add_param_group = optimizer.add_param_group
    # Schedulers ask the optimizer that they were built on whether it has stepped.
    optimizer.register_step_post_hook(functools.partial(_mark_stepped, torch_optimizer))
    return optimizer


def _mark_stepped(torch_optimizer: torch.optim.Optimizer, optimizer: torch.optim.Optimizer, args, kwargs) -> None:
    torch_optimizer._opt_called = True
