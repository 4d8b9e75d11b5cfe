"""Values for parameters that have none yet: modules built on the meta device are initialised one at a time."""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import nn

from zerolite.shards.units import UnitPlan

M = TypeVar("M", bound=nn.Module)


def parameters_on_meta(build: Callable[[], M]) -> M:
    """Run `build` with parameters on the meta device and buffers, which no checkpoint may hold, computed for real."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and not parameter.is_meta:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    nn.Module.register_parameter = register_on_meta
    try:
        return build()
    finally:
        nn.Module.register_parameter = register


def materialize(model: nn.Module, plan: UnitPlan, device: torch.device) -> None:
    """Give the parameters of one unit's module that lie on meta, and the buffers beside them, initial values.

    By `model._init_weights` (transformers) or the owning module's `reset_parameters` (torch); ValueError where a tensor
    has neither. Parameters keep their identity.
    """
    own = {id(parameter) for group in plan.groups for parameter in group.parameters}
    modules = [m for m in plan.module.modules() if _has_meta(m, own)]
    if not modules:
        return
    for module in modules:
        for parameter in module.parameters(recurse=False):
            if parameter.is_meta and id(parameter) in own:
                with without_weak_references(module):
                    filled = nn.Parameter(unset_like(parameter, device), requires_grad=parameter.requires_grad)
                    torch.utils.swap_tensors(parameter, filled)  # the same object, so that ties and owners stay
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = unset_like(buffer, device)
    with torch.no_grad():
        # Parents after children: some architectures initialise a submodule's weights from the module above it.
        for module in reversed([m for m in plan.module.modules() if _is_inside(m, own)]):
            if hasattr(model, "_init_weights"):
                model._init_weights(module)
            elif module in modules and hasattr(module, "reset_parameters"):
                module.reset_parameters()
    for module in modules:
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.numel() > 0 and not tensor.is_meta and is_unset(tensor):
                raise ValueError(
                    f"{type(module).__name__}.{name} lies on the meta device and nothing initialises it: give it "
                    "a reset_parameters(), or build the model on the CPU"
                )


def leave_meta(model: nn.Module, plan: UnitPlan, device: torch.device) -> None:
    """Move the parameters of one unit's module off the meta device without memory or values of their own."""
    with without_weak_references(plan.module):
        for group in plan.groups:
            for parameter in group.parameters if group.is_on_meta else ():
                nothing = torch.zeros((), dtype=parameter.dtype, device=device).expand(parameter.shape)
                torch.utils.swap_tensors(parameter, nn.Parameter(nothing, requires_grad=parameter.requires_grad))


@contextlib.contextmanager
def without_weak_references(module: nn.Module) -> Iterator[None]:
    """Recurrent modules of torch refer weakly to their weights, and no tensor with such a reference swaps."""
    recurrent = [inner for inner in module.modules() if isinstance(inner, nn.RNNBase)]
    for inner in recurrent:
        inner._flat_weight_refs = []
    try:
        yield
    finally:
        for inner in recurrent:
            inner._flat_weight_refs = [weakref.ref(w) if w is not None else None for w in inner._flat_weights]


def _has_meta(module: nn.Module, own: set[int]) -> bool:
    parameters = any(p.is_meta and id(p) in own for p in module.parameters(recurse=False))
    return parameters or any(b.is_meta for b in module.buffers(recurse=False))


def _is_inside(module: nn.Module, own: set[int]) -> bool:
    """No parameter below the module belongs to another unit that is sharded already."""
    return all(id(p) in own or p.is_meta for p in module.parameters())


def unset_like(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A filling that no initialiser writes: NaN, or the smallest integer."""
    if tensor.is_floating_point():
        return torch.full_like(tensor, float("nan"), device=device)
    return torch.full_like(tensor, 0 if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).min, device=device)


def is_unset(tensor: torch.Tensor) -> bool:
    if tensor.is_floating_point():
        return bool(tensor.isnan().all())
    return tensor.dtype != torch.bool and bool((tensor == torch.iinfo(tensor.dtype).min).all())
