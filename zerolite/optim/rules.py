"""Update rules on flat runs of elements: each knows its states, its hyperparameters and one step, and nothing else.

A run is 1D and holds elements of parameters that share a param group and a step count; parameter and states are of one
dtype (fp32 or fp64), the gradient of any, still to be multiplied by `multiplier` (clip factor, loss scale). On a device
a rule is a few torch operations; on the CPU, and in the workers, the host kernels run the same rule in one pass.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from zerolite_kernels.cpu import command as abi
from zerolite_kernels.cpu.command import Command

from zerolite.runtime import cpu_kernels as native
from zerolite.shards.grad_norm import add_up, sum_of_squares

Hyperparameters = Mapping[str, float | tuple[float, float]]


@dataclass(frozen=True)
class Run:
    """One run of elements to step; all tensors 1D and of one length."""

    parameter: torch.Tensor
    gradient: torch.Tensor
    states: dict[str, torch.Tensor]
    step: int  # this step's number, from 1
    hyper: Hyperparameters = field(repr=False)
    multiplier: float = 1.0  # of the gradient
    position: int = 0  # of its first element in the rank's piece

    def scaled_gradient(self) -> torch.Tensor:
        """The gradient as a rule takes it; a rule does not write to it."""
        if self.multiplier == 1.0 and self.gradient.dtype == self.parameter.dtype:
            return self.gradient
        return self.gradient.to(self.parameter.dtype, copy=True).mul_(self.multiplier)

    @property
    def is_native(self) -> bool:
        """Whether the host kernels serve; they take fp64 parameters with fp64 gradients."""
        is_mixed = (self.parameter.dtype == torch.float64) != (self.gradient.dtype == torch.float64)
        return not is_mixed and native.serves(self.parameter, self.gradient)


class Rule:
    """What the rules share: their form as a command to the host kernels."""

    name: int  # of the host kernels
    state_names: tuple[str, ...]
    is_per_parameter = False

    def numbers(self, hyper: Hyperparameters, step: int, multiplier: float) -> dict[str, float]:
        """The fields of a command that the rule decides."""
        beta1, beta2 = hyper["betas"]
        return {
            "rule": self.name,
            "multiplier": multiplier,
            "lr": hyper["lr"],
            "beta1": beta1,
            "beta2": beta2,
            "eps": hyper.get("eps", 0.0),
            "weight_decay": hyper["weight_decay"],
            "bias_correction1": 1 - beta1**step,
            "bias_correction2_sqrt": math.sqrt(1 - beta2**step),
        }

    def command(self, op: int, run: Run, **numbers: float) -> Command:
        """The host kernels' command for a run in this process."""
        first, numel = run.position, run.parameter.numel()
        is_fp64 = run.parameter.dtype == torch.float64
        return Command(
            op=op,
            numel=first + numel,
            first=first,
            last=first + numel,
            gradient_dtype=native.GRADIENT_DTYPES[run.gradient.dtype],
            parameter_kind=abi.IN_PLACE_FP64 if is_fp64 else abi.IN_PLACE_FP32,
            gradient=native.address(run.gradient, first),
            parameter=native.address(run.parameter, first),
            **{name: native.address(values, first) for name, values in run.states.items()},
            **self.numbers(run.hyper, run.step, run.multiplier),
            **numbers,
        )

    def step(self, run: Run, **numbers: float) -> None:
        """One update of the run, in place."""
        if run.is_native:
            native.execute(self.command(abi.STEP, run, **numbers))
        else:
            self.step_in_torch(run, **numbers)

    def step_in_torch(self, run: Run) -> None:
        raise NotImplementedError


class AdamRule(Rule):
    """Adam (Kingma & Ba 2015, algorithm 1), weight decay in the gradient (L2); torch's fused kernel on a device."""

    name = abi.ADAM
    state_names = ("exp_avg", "exp_avg_sq")
    functional = staticmethod(adam)

    def step_in_torch(self, run: Run) -> None:
        beta1, beta2 = run.hyper["betas"]
        # The functional form counts the step up itself; the counter lies where the kernel runs.
        before = torch.full((), float(run.step - 1), device=run.parameter.device)
        self.functional(
            [run.parameter], [run.scaled_gradient()], [run.states["exp_avg"]], [run.states["exp_avg_sq"]], [], [before],
            fused=True, amsgrad=False, beta1=beta1, beta2=beta2, lr=run.hyper["lr"],
            weight_decay=run.hyper["weight_decay"], eps=run.hyper["eps"], maximize=False,
        )  # fmt: skip


class AdamWRule(AdamRule):
    """AdamW (Loshchilov & Hutter 2019, algorithm 2): weight decay decoupled from the gradient."""

    name = abi.ADAMW
    functional = staticmethod(adamw)


class LionRule(Rule):
    """Lion (Chen et al. 2023, algorithm 2): the sign of an interpolated momentum, decoupled weight decay."""

    name = abi.LION
    state_names = ("exp_avg",)

    def step_in_torch(self, run: Run) -> None:
        beta1, beta2 = run.hyper["betas"]
        momentum, lr, gradient = run.states["exp_avg"], run.hyper["lr"], run.scaled_gradient()
        update = torch.lerp(gradient, momentum, beta1).sign_()
        run.parameter.mul_(1 - lr * run.hyper["weight_decay"]).add_(update, alpha=-lr)
        momentum.lerp_(gradient, 1 - beta2)


class LambRule(Rule):
    """LAMB (You et al. 2020, algorithm 2): Adam's direction, scaled a parameter at a time by |w| / |direction|.

    Two passes, since the norms of a parameter are known only when every rank has summed its part: `prepare` updates the
    moments and returns the two sums of squares, `step` scales the direction, computed anew rather than kept (it would
    cost as much memory as a third state), by the trust ratio. A ratio with a zero norm in it is 1.
    """

    name = abi.LAMB
    state_names = ("exp_avg", "exp_avg_sq")
    is_per_parameter = True

    def prepare(self, run: Run) -> torch.Tensor:
        """Update the moments; (2,) fp64: sums of squares of parameter and direction over this run."""
        if run.is_native:
            entries = native.sums(self.command(abi.PREPARE, run), width=2)
            return torch.tensor([add_up(entries[0::2]), add_up(entries[1::2])], dtype=torch.float64)
        beta1, beta2 = run.hyper["betas"]
        gradient = run.scaled_gradient()
        run.states["exp_avg"].lerp_(gradient, 1 - beta1)
        run.states["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        return torch.stack([sum_of_squares(run.parameter), sum_of_squares(self.direction(run))])

    def direction(self, run: Run) -> torch.Tensor:
        beta1, beta2 = run.hyper["betas"]
        denominator = run.states["exp_avg_sq"].sqrt().div_(math.sqrt(1 - beta2**run.step)).add_(run.hyper["eps"])
        direction = (run.states["exp_avg"] / (1 - beta1**run.step)).div_(denominator)
        return direction.add_(run.parameter, alpha=run.hyper["weight_decay"])

    def step_in_torch(self, run: Run, trust_ratio: float) -> None:
        run.parameter.add_(self.direction(run), alpha=-run.hyper["lr"] * trust_ratio)


def trust_ratio(parameter_squares: float, direction_squares: float) -> float:
    if parameter_squares == 0 or direction_squares == 0:
        return 1.0
    return math.sqrt(parameter_squares) / math.sqrt(direction_squares)
