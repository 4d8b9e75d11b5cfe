"""What an optimizer was told, as numbers and in words, for ranks to compare at every step."""

import weakref
from typing import TYPE_CHECKING

import torch

from zerolite.engine.engine import info_of
from zerolite.runtime.rank_settings import digest_of

if TYPE_CHECKING:
    from zerolite.optim.base import ShardedOptimizer


class StepSettings:
    """Class, groups, hyperparameters and clipping of one optimizer.

    A step takes one digest of their values, in microseconds. Names of parameters are hashed when groups change.
    """

    def __init__(self, optimizer: "ShardedOptimizer"):
        self._optimizer = weakref.ref(optimizer)  # which owns this
        self.clipped_to: float | None = None  # by the last clip_grad_norm_, which the next exchange compares
        self._groups_key: list[tuple] = []
        self._groups_digest = 0.0

    @property
    def optimizer(self) -> "ShardedOptimizer":
        optimizer = self._optimizer()
        assert optimizer is not None, "an optimizer owns its settings"
        return optimizer

    def numbers(self) -> list[float | torch.Tensor]:
        """Digest of all that is no tensor, and one sum of tensors, which stay where they are."""
        groups = self.optimizer.param_groups
        key = [(len(group["params"]), *(id(p) for p in group["params"][:1] + group["params"][-1:])) for group in groups]
        if key != self._groups_key:
            self._groups_key, self._groups_digest = key, digest_of(repr(self._groups()))
        values = [[self._value(group, name) for name in self.optimizer.defaults] for group in groups]
        text = repr((self._groups_digest, self._of_class(), values))
        return [digest_of(text), self._sum_of_tensors()]

    def in_words(self) -> dict[str, str]:
        names = self.optimizer.defaults
        words = self._of_class()
        words["number of parameters by group"] = str([len(group["params"]) for group in self.optimizer.param_groups])
        for index, group in enumerate(self.optimizer.param_groups):
            for name in names:
                value = group.get(name)
                words[f"{name} of param group {index}"] = (
                    f"{value}" if isinstance(value, torch.Tensor) else f"{value!r}"
                )
        return words | self._groups()

    def _of_class(self) -> dict[str, str]:
        return {
            "optimizer": type(self.optimizer).__name__,
            "max_grad_norm": repr(self.optimizer.max_grad_norm),
            "max_norm of the last clip_grad_norm_": repr(self.clipped_to),
        }

    def _groups(self) -> dict[str, str]:
        """Parameter -> its group."""
        found: dict[str, str] = {}
        for index, group in enumerate(self.optimizer.param_groups):
            for parameter in group["params"]:
                info = info_of(parameter)
                found[f"param group of {info.name if info is not None else tuple(parameter.shape)}"] = str(index)
        return found

    @staticmethod
    def _value(group: dict, name: str) -> object:
        value = group.get(name)
        return "a tensor" if isinstance(value, torch.Tensor) else value

    def _sum_of_tensors(self) -> float | torch.Tensor:
        """Hyperparameters that are tensors, weighted by their place, so that the host need not wait for them."""
        device = self.optimizer._engine.device.device
        total: float | torch.Tensor = 0.0
        place = 0
        for group in self.optimizer.param_groups:
            for name in self.optimizer.defaults:
                value = group.get(name)
                if isinstance(value, torch.Tensor):
                    place += 1
                    total = total + place * value.detach().to(device, torch.float64, non_blocking=True).sum()
        return total
