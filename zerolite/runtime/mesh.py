"""Which ranks shard and which replicate: from a DeviceMesh, from the world, or from one process alone."""

import datetime
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from zerolite.runtime import device as devices
from zerolite.runtime.collectives import Group, group_of

# A collective that waits longer than this on a rank that is gone or stuck ends this rank with an error.
TIMEOUT = datetime.timedelta(minutes=10)


def groups_of(mesh: DeviceMesh | None, device: torch.device) -> tuple[Group, Group]:
    """(shard group, replicate group) for tensors on `device`. Collective.

    Without a mesh the whole world shards; without torch.distributed, but with torchrun's variables, it is started.
    """
    if mesh is None:
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            dist.init_process_group(devices.of(device).backend, timeout=TIMEOUT)
        return group_of(dist.group.WORLD if dist.is_initialized() else None, device), Group()
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh= takes a torch.distributed.DeviceMesh, got {type(mesh).__name__}")
    if mesh.ndim not in (1, 2):
        raise ValueError(
            f"mesh= has 1 dimension (shard) or 2 (replicate x shard), got {mesh.ndim}: {tuple(mesh.shape)}"
        )
    if mesh.size() != dist.get_world_size():
        raise ValueError(
            f"the mesh {tuple(mesh.shape)} has {mesh.size()} ranks and the world {dist.get_world_size()}: "
            "build it over all ranks, or start that many processes"
        )
    if mesh.device_type != device.type:
        raise ValueError(
            f"the mesh is of {mesh.device_type} devices and the model goes to {device}: "
            f'use init_device_mesh("{device.type}", ...)'
        )
    shard_group = group_of(mesh.get_group(mesh.ndim - 1), device)
    return shard_group, group_of(mesh.get_group(0), device) if mesh.ndim == 2 else Group()
