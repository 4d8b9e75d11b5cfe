"""torch's optimizers on sharded parameters: refused at their first step, before anything changes."""

import functools

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from zerolite.engine.engine import info_of
from zerolite.errors import ZeroliteError


@functools.cache
def refuse_foreign_steps() -> None:
    """Have every torch.optim.Optimizer asked before each step, from now on in this process."""
    register_optimizer_step_pre_hook(_refuse)


def _refuse(optimizer: torch.optim.Optimizer, args, kwargs) -> None:
    if getattr(optimizer, "steps_shards", False):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            info = info_of(parameter)
            if info is not None and info.bucket.gradients is not None:
                name = type(optimizer).__name__
                raise ZeroliteError(
                    f"torch's {name} cannot step {info.name}, which zerolite has sharded: its gradient and states lie "
                    f"in shards. Build zerolite.AdamW(model.parameters()) or Adam, Lamb, Lion instead, or "
                    f"zerolite.like(optimizer) from an AdamW or Adam that was built already"
                )
