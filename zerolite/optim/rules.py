"""Update rules on segments of elements: each knows its states, its hyperparameters and one step, and nothing else.

A rule steps `Operands`, 1D tensors of one segment, by the numbers of an `Update`. On a device a rule is a few torch
operations; on the CPU, and in the workers, the host kernels run the same rule in one pass.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from zerolite_kernels.cpu import command as abi
from zerolite_kernels.cpu.command import Command

from zerolite.runtime import cpu_kernels
from zerolite.shards.grad_norm import add_up, sum_of_squares
from zerolite.shards.update import Operands, Update


def scaled_gradient(operands: Operands, update: Update) -> torch.Tensor:
    """The gradient times the multiplier, in the parameter's dtype; a rule does not write to it."""
    if update.multiplier == 1.0 and operands.gradient.dtype == operands.parameter.dtype:
        return operands.gradient
    return operands.gradient.to(operands.parameter.dtype, copy=True).mul_(update.multiplier)


class Rule(ABC):
    """What the rules share: their form as a command to the host kernels."""

    name: int  # of the host kernels
    state_names: tuple[str, ...]
    is_per_parameter = False
    is_decoupled = True  # weight decay is no part of the gradient

    def is_one_pass(self, operands: Operands) -> bool:
        """Whether the host kernels serve, which need no scratch; they take fp64 parameters with fp64 gradients."""
        is_mixed = (operands.parameter.dtype == torch.float64) != (operands.gradient.dtype == torch.float64)
        return not is_mixed and cpu_kernels.serves(operands.parameter, operands.gradient)

    def numbers(self, update: Update) -> dict[str, float]:
        """The fields of a command that the rule and the update decide."""
        hyper, step = update.hyper, update.step
        beta1, beta2 = hyper["betas"]
        return {
            "rule": self.name,
            "seed": update.seed,
            "multiplier": update.multiplier,
            "lr": hyper["lr"],
            "beta1": beta1,
            "beta2": beta2,
            "eps": hyper.get("eps", 0.0),
            "weight_decay": hyper["weight_decay"],
            "trust_ratio": update.trust_ratio,
            "bias_correction1": 1 - beta1**step,
            "bias_correction2_sqrt": math.sqrt(1 - beta2**step),
        }

    def command(self, op: int, operands: Operands, update: Update) -> Command:
        """The host kernels' command for tensors of this process."""
        first, numel = operands.position, operands.parameter.numel()
        is_fp64 = operands.parameter.dtype == torch.float64
        return Command(
            op=op,
            numel=first + numel,
            first=first,
            last=first + numel,
            gradient_dtype=cpu_kernels.GRADIENT_DTYPES[operands.gradient.dtype],
            parameter_kind=abi.IN_PLACE_FP64 if is_fp64 else abi.IN_PLACE_FP32,
            gradient=cpu_kernels.address(operands.gradient, first),
            parameter=cpu_kernels.address(operands.parameter, first),
            **{name: cpu_kernels.address(values, first) for name, values in operands.states.items()},
            **self.numbers(update),
        )

    def step(self, operands: Operands, update: Update) -> None:
        """One update of the segment, in place."""
        if self.is_one_pass(operands):
            cpu_kernels.execute(self.command(abi.STEP, operands, update))
        else:
            self.step_in_torch(operands, update)

    @abstractmethod
    def step_in_torch(self, operands: Operands, update: Update) -> None:
        """The same in torch's operations, on a device or where the host kernels were not built."""


class AdamRule(Rule):
    """Adam (Kingma & Ba 2015, algorithm 1), weight decay in the gradient (L2); torch's fused kernel on a device."""

    name = abi.ADAM
    state_names = ("exp_avg", "exp_avg_sq")
    is_decoupled = False
    functional: Callable[..., None] = staticmethod(adam)

    def step_in_torch(self, operands: Operands, update: Update) -> None:
        beta1, beta2 = update.hyper["betas"]
        # The functional form counts the step up itself; the counter lies where the kernel runs.
        before = torch.full((), float(update.step - 1), device=operands.parameter.device)
        exp_avg, exp_avg_sq = operands.states["exp_avg"], operands.states["exp_avg_sq"]
        self.functional(
            [operands.parameter], [scaled_gradient(operands, update)], [exp_avg], [exp_avg_sq], [], [before],
            fused=True, amsgrad=False, beta1=beta1, beta2=beta2, lr=update.hyper["lr"],
            weight_decay=update.hyper["weight_decay"], eps=update.hyper["eps"], maximize=False,
        )  # fmt: skip


class AdamWRule(AdamRule):
    """AdamW (Loshchilov & Hutter 2019, algorithm 2): weight decay decoupled from the gradient."""

    name = abi.ADAMW
    is_decoupled = True
    functional: Callable[..., None] = staticmethod(adamw)


class LionRule(Rule):
    """Lion (Chen et al. 2023, algorithm 2): the sign of an interpolated momentum, decoupled weight decay."""

    name = abi.LION
    state_names = ("exp_avg",)

    def step_in_torch(self, operands: Operands, update: Update) -> None:
        beta1, beta2 = update.hyper["betas"]
        momentum, lr, gradient = operands.states["exp_avg"], update.hyper["lr"], scaled_gradient(operands, update)
        direction = torch.lerp(gradient, momentum, beta1).sign_()
        operands.parameter.mul_(1 - lr * update.hyper["weight_decay"]).add_(direction, alpha=-lr)
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

    def prepare(self, operands: Operands, update: Update) -> torch.Tensor:
        """Update the moments; (2,) fp64: sums of squares of parameter and direction over this segment."""
        if self.is_one_pass(operands):
            entries = cpu_kernels.sums(self.command(abi.PREPARE, operands, update), width=2)
            return torch.tensor([add_up(entries[0::2]), add_up(entries[1::2])], dtype=torch.float64)
        beta1, beta2 = update.hyper["betas"]
        gradient = scaled_gradient(operands, update)
        operands.states["exp_avg"].lerp_(gradient, 1 - beta1)
        operands.states["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        position = operands.position
        squares = [
            sum_of_squares(values, position) for values in (operands.parameter, self.direction(operands, update))
        ]
        return torch.stack(squares)

    def direction(self, operands: Operands, update: Update) -> torch.Tensor:
        beta1, beta2 = update.hyper["betas"]
        denominator = operands.states["exp_avg_sq"].sqrt().div_(math.sqrt(1 - beta2**update.step))
        denominator.add_(update.hyper["eps"])
        direction = (operands.states["exp_avg"] / (1 - beta1**update.step)).div_(denominator)
        return direction.add_(operands.parameter, alpha=update.hyper["weight_decay"])

    def step_in_torch(self, operands: Operands, update: Update) -> None:
        alpha = -update.hyper["lr"] * update.trust_ratio
        operands.parameter.add_(self.direction(operands, update), alpha=alpha)


def trust_ratio(parameter_squares: float, direction_squares: float) -> float:
    if parameter_squares == 0 or direction_squares == 0:
        return 1.0
    return math.sqrt(parameter_squares) / math.sqrt(direction_squares)
