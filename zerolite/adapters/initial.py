"""Initial values of adapters that come from the base, where it had none yet when they were added."""

import torch
from torch import nn

from zerolite.adapters import lora, prompts
from zerolite.adapters.walk import in_turn


@torch.no_grad()
def settle_initial_values(model: nn.Module) -> None:
    """Compute DoRA's magnitudes and virtual tokens that a base on the meta device could not give. Collective.

    To be called once the base and its buffers are there, before anything is trained.
    """
    adapters = getattr(model, "_zerolite_adapters", None)
    if adapters is None:
        return
    lora.settle_initial_values(model)
    prompts.settle_initial_values(model)
    for _ in in_turn(model, [p for a in adapters.by_name.values() for p in a.parameters.values()], edits=True):
        pass  # what was written reaches the master and the host
