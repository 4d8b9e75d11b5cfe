"""Which ranks shard and which replicate: from a DeviceMesh, from the world, or from one process alone."""

import contextlib
import datetime
import os
import secrets

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from zerolite.runtime import abort
from zerolite.runtime import device as devices
from zerolite.runtime.attempts import own_names
from zerolite.runtime.collectives import Group, group_of

# A collective that waits longer than this on a rank that is gone or stuck ends this rank with an error.
TIMEOUT = datetime.timedelta(minutes=10)


class RankMesh:
    """The ranks of one model: this rank's group to shard over, and its group of replicas."""

    def __init__(self, shard: Group, replicas: Group):
        self.shard, self.replicas = shard, replicas
        self.world_size = shard.size * replicas.size
        self.rank = replicas.rank * shard.size + shard.rank  # shard dimension fastest
        self.purpose = ""  # what gathers are for now, where it is no forward or backward; a part of their labels

    @contextlib.contextmanager
    def gathering_for(self, purpose: str):
        """Inside, gathers are for this: one that another rank's forward issues does not match them."""
        before, self.purpose = self.purpose, f" for {purpose}"
        try:
            yield
        finally:
            self.purpose = before

    def all_gather_scalars(self, scalars: torch.Tensor) -> torch.Tensor:
        """Every rank's few fp64 numbers (n,), on this rank's device, as (replicas, shards, n) on the host. Collective.

        Nothing may be in flight that this rank has started and another has not: see `Engine.all_gather_scalars`.
        """
        rows = self.shard.all_gather_scalars(scalars)
        if self.replicas.size > 1:  # else no way back to the device, which the host would wait for
            rows = self.replicas.all_gather_scalars(rows.reshape(-1).to(scalars.device))
        return rows.view(self.replicas.size, self.shard.size, scalars.numel())


def mesh_of(mesh: DeviceMesh | None, device: torch.device) -> RankMesh:
    """The ranks that a model is sharded over, its tensors on `device`, which becomes the current one. Collective.

    Without a mesh the whole world shards; without torch.distributed, but with torchrun's variables, it is started.
    TypeError or ValueError for a mesh of another kind, number of dimensions, size or device.
    """
    own = devices.of(device)
    own.select()
    found = _mesh_of(mesh, device, own)
    # Rank 0's, drawn apart from `random`, which users seed.
    number = torch.tensor([secrets.SystemRandom().random()], dtype=torch.float64, device=device)
    abort.listen(found.all_gather_scalars(number).view(-1)[0].item())
    return found


def _mesh_of(mesh: DeviceMesh | None, device: torch.device, own: devices.Device) -> RankMesh:
    """Collective, where the process group is started here."""
    if mesh is None:
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            dist.init_process_group(own.backend, timeout=TIMEOUT, device_id=own.bound, **own_names(TIMEOUT))
        return RankMesh(group_of(dist.group.WORLD if dist.is_initialized() else None, device), Group())
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
    shard = group_of(mesh.get_group(mesh.ndim - 1), device)
    return RankMesh(shard, group_of(mesh.get_group(0), device) if mesh.ndim == 2 else Group())
