"""Update rules on flat runs of elements: each knows its states, its hyperparameters and one step, and nothing else.

A run is 1D, one dtype (fp32 or fp64) for parameter, gradient and states, and holds elements of parameters that share a
param group and a step count. `gradient` is unscaled and clipped; a rule does not write to it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from zerolite.optim.norm import sum_of_squares

Hyperparameters = Mapping[str, float | tuple[float, float]]


@dataclass(frozen=True)
class Run:
    """One run of elements to step; all tensors 1D and of one length."""

    parameter: torch.Tensor
    gradient: torch.Tensor
    states: dict[str, torch.Tensor]
    step: int  # this step's number, from 1
    hyper: Hyperparameters = field(repr=False)


class AdamRule:
    """Adam (Kingma & Ba 2015, algorithm 1), weight decay in the gradient (L2); the kernel is torch's fused one."""

    state_names = ("exp_avg", "exp_avg_sq")
    is_per_parameter = False
    functional = staticmethod(adam)

    def step(self, run: Run) -> None:
        beta1, beta2 = run.hyper["betas"]
        # The functional form counts the step up itself; the counter lies where the kernel runs.
        before = torch.full((), float(run.step - 1), device=run.parameter.device)
        self.functional(
            [run.parameter], [run.gradient], [run.states["exp_avg"]], [run.states["exp_avg_sq"]], [], [before],
            fused=True, amsgrad=False, beta1=beta1, beta2=beta2, lr=run.hyper["lr"],
            weight_decay=run.hyper["weight_decay"], eps=run.hyper["eps"], maximize=False,
        )  # fmt: skip


class AdamWRule(AdamRule):
    """AdamW (Loshchilov & Hutter 2019, algorithm 2): weight decay decoupled from the gradient."""

    functional = staticmethod(adamw)


class LionRule:
    """Lion (Chen et al. 2023, algorithm 2): the sign of an interpolated momentum, decoupled weight decay."""

    state_names = ("exp_avg",)
    is_per_parameter = False

    def step(self, run: Run) -> None:
        beta1, beta2 = run.hyper["betas"]
        momentum, lr = run.states["exp_avg"], run.hyper["lr"]
        update = torch.lerp(run.gradient, momentum, beta1).sign_()
        run.parameter.mul_(1 - lr * run.hyper["weight_decay"]).add_(update, alpha=-lr)
        momentum.lerp_(run.gradient, 1 - beta2)


class LambRule:
    """LAMB (You et al. 2020, algorithm 2): Adam's direction, scaled a parameter at a time by |w| / |direction|.

    Two passes, since the norms of a parameter are known only when every rank has summed its part: `prepare` updates the
    moments and returns the two sums of squares, `step` scales the direction, computed anew rather than kept (it would
    cost as much memory as a third state), by the trust ratio. A ratio with a zero norm in it is 1.
    """

    state_names = ("exp_avg", "exp_avg_sq")
    is_per_parameter = True

    def prepare(self, run: Run) -> torch.Tensor:
        """Update the moments; (2,) fp64: sums of squares of parameter and direction over this run."""
        beta1, beta2 = run.hyper["betas"]
        run.states["exp_avg"].lerp_(run.gradient, 1 - beta1)
        run.states["exp_avg_sq"].mul_(beta2).addcmul_(run.gradient, run.gradient, value=1 - beta2)
        return torch.stack([sum_of_squares(run.parameter), sum_of_squares(self.direction(run))])

    def direction(self, run: Run) -> torch.Tensor:
        beta1, beta2 = run.hyper["betas"]
        denominator = run.states["exp_avg_sq"].sqrt().div_(math.sqrt(1 - beta2**run.step)).add_(run.hyper["eps"])
        direction = (run.states["exp_avg"] / (1 - beta1**run.step)).div_(denominator)
        return direction.add_(run.parameter, alpha=run.hyper["weight_decay"])

    def step(self, run: Run, trust_ratio: float) -> None:
        run.parameter.add_(self.direction(run), alpha=-run.hyper["lr"] * trust_ratio)


def trust_ratio(parameter_squares: float, direction_squares: float) -> float:
    if parameter_squares == 0 or direction_squares == 0:
        return 1.0
    return math.sqrt(parameter_squares) / math.sqrt(direction_squares)
