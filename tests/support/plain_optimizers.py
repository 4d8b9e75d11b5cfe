"""Lion and LAMB as their papers have them, as optimizers of plain torch: what torch.optim has not."""

from __future__ import annotations

import torch
from torch import Tensor


class PlainOptimizer(torch.optim.Optimizer):
    """States, groups, closures and hooks are torch's; a rule updates one parameter."""

    def rule(self, parameter: Tensor, gradient: Tensor, state: dict, group: dict) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["step"] = state.get("step", torch.tensor(0.0)) + 1
                    self.rule(parameter, parameter.grad, state, group)
        return loss


class Lion(PlainOptimizer):
    """Chen et al. 2023, algorithm 2."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    def rule(self, parameter, gradient, state, group):
        lr, (beta1, beta2) = group["lr"], group["betas"]
        momentum = state.setdefault("exp_avg", torch.zeros_like(parameter))
        direction = torch.sign(beta1 * momentum + (1 - beta1) * gradient)
        parameter -= lr * (direction + group["weight_decay"] * parameter)
        momentum.mul_(beta2).add_((1 - beta2) * gradient)


class Lamb(PlainOptimizer):
    """You et al. 2020, algorithm 2; a norm of 0 means a ratio of 1."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    def rule(self, parameter, gradient, state, group):
        (beta1, beta2), step = group["betas"], int(state["step"])
        mean = state.setdefault("exp_avg", torch.zeros_like(parameter))
        square = state.setdefault("exp_avg_sq", torch.zeros_like(parameter))
        mean.mul_(beta1).add_((1 - beta1) * gradient)
        square.mul_(beta2).add_((1 - beta2) * gradient**2)
        direction = (mean / (1 - beta1**step)) / ((square / (1 - beta2**step)).sqrt() + group["eps"])
        direction += group["weight_decay"] * parameter
        sizes = parameter.norm(), direction.norm()
        parameter -= group["lr"] * (sizes[0] / sizes[1] if min(sizes) > 0 else 1.0) * direction
