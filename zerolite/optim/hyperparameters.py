"""Which numbers and options a param group may have: as torch.optim's constructors check them, and in every group."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

# Of torch's Adam and AdamW. What is not here (fused, foreach) chooses a kernel and changes no number.
_WAYS_OUT = {
    "amsgrad": "set it to False",
    "maximize": "set it to False and negate the loss",
    "capturable": "set it to False: steps of sharded optimizers are not captured in CUDA graphs",
    "differentiable": "set it to False: steps are not differentiated",
}
_KERNELS = ("fused", "foreach")


def check_hyperparameters(lr, betas, eps, weight_decay) -> None:
    """ValueError as torch.optim's constructors raise it."""
    if isinstance(lr, torch.Tensor) and lr.numel() != 1:
        raise ValueError(f"lr is a number or a tensor of one element, got a tensor of shape {tuple(lr.shape)}")
    if not lr >= 0:
        raise ValueError(f"lr is a number of at least 0, got {lr}")
    if any(isinstance(beta, torch.Tensor) for beta in betas):
        raise ValueError(f"betas are two numbers, got tensors: give {tuple(map(float, betas))}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas are two numbers in [0, 1), got {betas}")
    if not eps >= 0:
        raise ValueError(f"eps is a number of at least 0, got {eps}")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay is a number of at least 0, got {weight_decay}")


def check_torch_options(optimizer: str, options: Mapping[str, Any], is_decoupled: bool) -> None:
    """Arguments of torch's optimizer beyond ours: TypeError for one that it has not, ValueError as `check_options`."""
    for name in options:
        if name not in (*_WAYS_OUT, *_KERNELS, "decoupled_weight_decay"):
            raise TypeError(f"{optimizer}.__init__() got an unexpected keyword argument '{name}'")
    _check(f"{optimizer} was given", options, is_decoupled)


def check_options(param_groups: Sequence[Mapping[str, Any]], is_decoupled: bool) -> None:
    """ValueError where a group asks for what no rule does; such a group may come from torch's optimizers or by hand."""
    for index, group in enumerate(param_groups):
        _check(f"param group {index} has", group, is_decoupled)


def _check(where: str, options: Mapping[str, Any], is_decoupled: bool) -> None:
    for name, way_out in _WAYS_OUT.items():
        if options.get(name):
            raise ValueError(f"{where} {name}={options[name]}, which zerolite's optimizers have not: {way_out}")
    given = options.get("decoupled_weight_decay", is_decoupled)
    if bool(given) != is_decoupled:
        way_out = "zerolite.AdamW decouples, zerolite.Adam does not"
        raise ValueError(f"{where} decoupled_weight_decay={given}, which is of another rule: {way_out}")
