"""What a shard is stepped with: an optimizer's rule, the numbers of one update, the tensors of one segment."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from zerolite.shards.layout import Range

Hyperparameters = Mapping[str, Any]  # a param group of torch.optim's


@dataclass(frozen=True)
class Update:
    """One update of one segment: which elements, and every number that a rule needs."""

    range: Range
    hyper: Hyperparameters
    step: int  # this step's number, from 1
    multiplier: float  # of the gradient: clip factor, loss scale
    seed: int = 0  # of stochastic rounding
    slot: int = 0  # of the parameter, where the rule works a parameter at a time
    trust_ratio: float = 1.0  # LAMB's


@dataclass(frozen=True)
class Operands:
    """The tensors of one update, all 1D and of one length; parameter and states are of one dtype, fp32 or fp64."""

    parameter: torch.Tensor
    gradient: torch.Tensor
    states: Mapping[str, torch.Tensor]
    position: int = 0  # of the first element in the rank's shard


class Rule(Protocol):
    """An optimizer's arithmetic on segments: `optim.rules`."""

    @property
    def state_names(self) -> tuple[str, ...]: ...

    @property
    def is_per_parameter(self) -> bool: ...  # whether it is a `TwoPassRule`

    def numbers(self, update: Update) -> dict[str, float]: ...

    def step(self, operands: Operands, update: Update) -> None: ...

    def is_one_pass(self, operands: Operands) -> bool: ...


class TwoPassRule(Rule, Protocol):
    """A rule that needs sums over whole parameters before it steps: LAMB."""

    def prepare(self, operands: Operands, update: Update) -> torch.Tensor: ...
