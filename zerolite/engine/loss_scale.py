"""Dynamic loss scaling for fp16 by the rules of torch.amp.GradScaler (Micikevicius et al. 2018, section 3.2)."""

import torch

from zerolite.config import Precision

FLOOR = 1.0  # below it fp16 gradients that overflow do so for another reason


class LossScale:
    """The factor that the loss carries: halved on an overflow, doubled after `growth_interval` good steps."""

    def __init__(self, value: float, growth_factor: float, backoff_factor: float, growth_interval: int):
        self.value = value
        self.growth_factor = growth_factor
        self.backoff_factor = backoff_factor
        self.growth_interval = growth_interval
        self.floor = min(FLOOR, value)
        self.num_good_steps = 0  # since the last change
        self.num_overflows = 0  # in a row

    @classmethod
    def of(cls, precision: Precision | None) -> "LossScale | None":
        """The scale that a precision needs: none but for fp16 parameters."""
        if precision is None or precision.param is not torch.float16:
            return None
        rules = precision.scaler or torch.amp.GradScaler("cpu")
        return cls(
            rules.get_scale(), rules.get_growth_factor(), rules.get_backoff_factor(), rules.get_growth_interval()
        )

    def update(self, overflowed: bool) -> None:
        """After a step, or after one that was skipped because a gradient `overflowed`."""
        if overflowed:
            self.value = max(self.value * self.backoff_factor, self.floor)
            self.num_good_steps = 0
            self.num_overflows += 1
            return
        self.num_overflows = 0
        self.num_good_steps += 1
        if self.num_good_steps == self.growth_interval:
            grown = self.value * self.growth_factor
            if grown < float("inf"):
                self.value = grown
            self.num_good_steps = 0

    def state_dict(self) -> dict[str, float | int]:
        return {"value": self.value, "num_good_steps": self.num_good_steps}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        self.value, self.num_good_steps = float(state["value"]), int(state["num_good_steps"])
