"""DTensor parameters: which of a tensor's elements are this rank's, and over which ranks they are split.

torch's `parallelize_module` makes parameters DTensors: a tensor object that stands for the whole, around a plain one
that has this rank's elements. A bucket holds the plain ones; whoever reads the parameter reads them through it.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from zerolite.shards.blocks import Block

Ranks = tuple[int, ...]  # of one process group, in the world


def is_distributed(parameter: torch.Tensor) -> bool:
    return isinstance(parameter, DTensor)


def local_of(parameter: torch.Tensor) -> torch.Tensor:
    """The plain tensor with this rank's elements: of any other parameter, itself."""
    return parameter._local_tensor if isinstance(parameter, DTensor) else parameter


def own_local(parameter: torch.Tensor) -> torch.Tensor:
    """The same, once the parameter has a plain tensor that nobody else refers to."""
    if isinstance(parameter, DTensor):
        parameter._local_tensor = parameter._local_tensor.detach()
    return local_of(parameter)


def local_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    return tuple(local_of(parameter).shape)


def placed(parameter: torch.Tensor) -> str:
    """The placements of a DTensor, in words for settings; of other parameters nothing."""
    return f", placed {parameter.placements}" if isinstance(parameter, DTensor) else ""


def block_of(parameter: torch.Tensor) -> Block | None:
    """Where this rank's elements lie in the whole parameter; None where they are all of it."""
    if not isinstance(parameter, DTensor) or not splits_of(parameter):
        return None
    shape, offsets = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return Block(tuple(offsets), tuple(shape))


def largest_numel(parameter: torch.Tensor) -> int:
    """The most elements that any rank has of it, the same number on every rank."""
    if not isinstance(parameter, DTensor):
        return parameter.numel()
    shape = list(parameter.shape)
    for dim, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            shape[placement.dim] = -(-shape[placement.dim] // parameter.device_mesh.size(dim))
    return math.prod(shape)


def splits_of(parameter: torch.Tensor) -> tuple[Ranks, ...]:
    """The groups of ranks that the parameter is split over; none where every rank has all of it."""
    if not isinstance(parameter, DTensor):
        return ()
    groups = zip(parameter.placements, parameter.device_mesh.get_all_groups(), strict=True)
    ranks = [dist.get_process_group_ranks(group) for placement, group in groups if not isinstance(placement, Replicate)]
    return tuple(tuple(one) for one in ranks if len(one) > 1)


def groups_of(model: nn.Module) -> list[dist.ProcessGroup]:
    """The process groups of all meshes that the model's DTensors are of, each once."""
    found: dict[Ranks, dist.ProcessGroup] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if isinstance(tensor, DTensor):
            for group in tensor.device_mesh.get_all_groups():
                found.setdefault(tuple(dist.get_process_group_ranks(group)), group)
    return list(found.values())


def check_distributed(model: nn.Module, mesh_ranks: Sequence[Ranks]) -> None:
    """ValueError, by name, for a DTensor that cannot be a part of a bucket. mesh_ranks: of groups of several ranks."""
    for name, buffer in model.named_buffers():
        if isinstance(buffer, DTensor) and splits_of(buffer):
            raise ValueError(f"the buffer {name} is split over ranks (a DTensor): keep whole buffers, or a parameter")
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            continue
        odd = [p for p in parameter.placements if type(p) not in (Shard, Replicate)]
        if odd:
            raise ValueError(
                f"{name} is a DTensor placed as {odd[0]!r}: zerolite.shard takes Shard and Replicate, as torch's "
                "parallelize_module makes them; do not apply FSDP2's fully_shard before"
            )
        if parameter.is_meta or local_of(parameter).is_meta:
            raise ValueError(
                f"{name} is a DTensor on the meta device, which has no values: materialise the model first "
                "(model.to_empty(device=...) and its initialisation), or parallelize one that has values"
            )
        for ranks in splits_of(parameter):
            assert ranks in mesh_ranks, f"{name} is split over {ranks}, of no known group"


def local_gradient(parameter: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """This rank's elements of a DTensor's gradient, once it is placed as the parameter is.

    Collective over the ranks of tensor parallelism where autograd leaves another placement, as of a sum of parts.
    """
    if not (isinstance(gradient, DTensor) and isinstance(parameter, DTensor)):
        return gradient
    if tuple(gradient.placements) != tuple(parameter.placements):
        gradient = gradient.redistribute(placements=parameter.placements)
    return gradient._local_tensor


def whole_of(parameter: torch.Tensor) -> torch.Tensor:
    """All elements of a DTensor. Collective over its mesh."""
    return parameter.detach().full_tensor() if isinstance(parameter, DTensor) else parameter


def cast(parameter: nn.Parameter, dtype: torch.dtype) -> None:
    """Give a DTensor another dtype, which its wrapper has as well as its memory; the same object stays."""
    if isinstance(parameter, DTensor) and parameter.dtype != dtype:
        made = nn.Parameter(parameter.detach().to(dtype), requires_grad=parameter.requires_grad)
        torch.utils.swap_tensors(parameter, made)
