"""Which parameters can be sharded; the others are refused by name before anything moves."""

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from zerolite.config import LOW_PRECISION
from zerolite.shards.dtensors import local_of

STEPPED = (torch.float64, torch.float32, *LOW_PRECISION)


def is_computed_in(dtype: torch.dtype) -> bool:
    """Whether modules compute in it, so that `Precision` may change it; float8 values mean something with a scale."""
    return dtype in STEPPED


def check_parameters(model: nn.Module) -> None:
    """ValueError for parameters without a shape, complex and trainable ones that no rule steps, two over one memory."""
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"{name} has no shape before the first forward of its lazy module: run one before zerolite.shard"
            )
        if parameter.is_complex():
            raise ValueError(
                f"{name} is complex ({parameter.dtype}), and reductions and optimizers work on real numbers: keep "
                "torch.view_as_real of it as the parameter and call torch.view_as_complex in forward"
            )
        if parameter.requires_grad and not is_computed_in(parameter.dtype):
            raise ValueError(
                f"{name} is trainable in {parameter.dtype}, which no optimizer here steps: freeze it with "
                "requires_grad_(False), or cast it to bfloat16 or float32"
            )
    _refuse_shared_memory(model)


def _refuse_shared_memory(model: nn.Module) -> None:
    """Two parameters over one memory would get two shards, and part at the first step."""
    regions: dict[tuple, list[tuple[int, int, str]]] = {}
    for name, parameter in model.named_parameters():
        parameter = local_of(parameter)
        if parameter.is_meta or parameter.numel() == 0 or parameter.layout != torch.strided:
            continue
        last = sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
        start = parameter.data_ptr()
        region = (start, start + (last + 1) * parameter.element_size(), name)
        regions.setdefault((parameter.device, parameter.untyped_storage().data_ptr()), []).append(region)
    for shared in regions.values():
        shared.sort()
        for (_, end, name), (start, _, other) in zip(shared, shared[1:], strict=False):
            if start < end:
                raise ValueError(
                    f"{name} and {other} are two parameters over the same memory, which sharding would part: tie them "
                    "by giving both modules one nn.Parameter object, or give each its own memory with .clone()"
                )
