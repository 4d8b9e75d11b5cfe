"""Which ranks shard and which replicate: from a DeviceMesh, from the world, or from one process alone.

[Note: the dimensions of a model's ranks]

    shard, replicas   other data, the same parameters: gradients are their mean
    tensor            the same data, other parts of DTensor parameters (tensor parallelism)
    pipeline          other parameters (pipeline stages), of one norm and one decision to step

Ranks of one dimension differ in that coordinate alone, so any two groups of a rank have only the rank in common.
"""

import contextlib
import dataclasses
import datetime
import os
import secrets
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from zerolite.runtime import abort
from zerolite.runtime import device as devices
from zerolite.runtime.attempts import own_names
from zerolite.runtime.collectives import Group, group_of

# A collective that waits longer than this on a rank that is gone or stuck ends this rank with an error.
TIMEOUT = datetime.timedelta(minutes=10)


class TensorGroup(NamedTuple):
    """Ranks that hold other parts of the same DTensor parameters."""

    group: Group
    ranks: tuple[int, ...]  # in the world

    def splits(self, splits: Sequence[tuple[int, ...]]) -> bool:
        """Whether a parameter that is split over groups of these ranks is split over this one."""
        return self.ranks in splits


class RankMesh:
    """The ranks of one model: see [Note: the dimensions of a model's ranks]."""

    def __init__(
        self,
        shard: Group,
        replicas: Group,
        tensor: Sequence[TensorGroup] = (),
        pipeline: Sequence[Group] = (),
    ):
        self.shard, self.replicas = shard, replicas
        self.tensor, self.pipeline = tuple(tensor), tuple(pipeline)
        self.world_size = shard.size * replicas.size  # ranks of other data
        self.rank = replicas.rank * shard.size + shard.rank  # among those, shard dimension fastest
        self.is_alone = self.world_size == 1 and not tensor  # no other rank has a part of this rank's gradients
        self.purpose = ""  # what gathers are for now, where it is no forward or backward; a part of their labels

    def stage_ranks(self, device: torch.device, before: "Callable[[], object]" = bool) -> "ModelRanks":
        """Those of one pipeline stage; `before` each exchange is called."""
        return ModelRanks(self, tuple(one.group for one in self.tensor), device, before)

    def all_ranks(self, device: torch.device, before: "Callable[[], object]" = bool) -> "ModelRanks":
        """Those that hold any part of the model; `before` each exchange is called."""
        return ModelRanks(self, (*(one.group for one in self.tensor), *self.pipeline), device, before)

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


@dataclasses.dataclass(frozen=True)
class ModelRanks:
    """Ranks of one model beyond those of other data: a `Ranks` of rank_errors.py.

    Rows are in the order of ranks in the world where there are other dimensions; else as `RankMesh` has them.
    """

    mesh: RankMesh
    others: tuple[Group, ...]
    device: torch.device
    before: Callable[[], object]  # one rank may have started alone what must be over before an exchange

    def all_gather_scalars(self, scalars: torch.Tensor) -> torch.Tensor:
        """Every rank's few fp64 numbers (n,) as rows (size, n) on the host. Collective."""
        self.before()
        if not self.others:
            return self.mesh.all_gather_scalars(scalars.to(self.device)).view(-1, scalars.numel())
        rows = torch.cat([torch.tensor([float(dist.get_rank())], dtype=torch.float64), scalars.cpu()]).unsqueeze(0)
        width = rows.shape[1]
        for group in (self.mesh.shard, self.mesh.replicas, *self.others):
            rows = group.all_gather_scalars(rows.reshape(-1).to(self.device)).view(-1, width)
        return rows[rows[:, 0].argsort(), 1:].contiguous()

    @property
    def size(self) -> int:
        size = self.mesh.world_size
        for group in self.others:
            size *= group.size
        return size

    def place(self) -> tuple[int, int]:
        """This rank's row, and how many there are. Collective where there are other dimensions."""
        if not self.others:
            return self.mesh.rank, self.size
        own = float(dist.get_rank())
        rows = self.all_gather_scalars(torch.tensor([own], dtype=torch.float64)).view(-1).tolist()
        return rows.index(own), len(rows)


def mesh_of(
    mesh: DeviceMesh | None,
    device: torch.device,
    tensor: Sequence[dist.ProcessGroup] = (),
    norm_over: Sequence[DeviceMesh] = (),
) -> RankMesh:
    """The ranks that a model is sharded over, its tensors on `device`, which becomes the current one. Collective.

    Without a mesh the whole world shards; without torch.distributed, but with torchrun's variables, it is started.
    tensor: of the model's DTensors. norm_over: the meshes of other pipeline stages.
    TypeError or ValueError for a mesh of another kind, number of dimensions or device, for one without this rank, and
    for dimensions that overlap or leave out ranks of the mesh that they are slices of.
    """
    own = devices.of(device)
    own.select()
    if not isinstance(norm_over, list | tuple) or not all(isinstance(one, DeviceMesh) for one in norm_over):
        raise TypeError(f'norm_over= takes a tuple of DeviceMeshes, as (mesh["pp"],), got {norm_over!r}')
    found = _mesh_of(mesh, device, own)
    if tensor or norm_over:
        for one in norm_over:
            _check_mesh(one, "norm_over=", device)
        pipeline = [one.get_group(dim) for one in norm_over for dim in range(one.ndim)]
        _check_dimensions(mesh, tensor, pipeline)
        tensor = [group for group in tensor if dist.get_world_size(group) > 1]
        found = RankMesh(
            found.shard,
            found.replicas,
            [TensorGroup(group_of(group, device), _ranks_of(group)) for group in tensor],
            [group_of(group, device) for group in pipeline if dist.get_world_size(group) > 1],
        )
    ranks = found.all_ranks(device)
    if mesh is not None:
        _check_cover(mesh, ranks.size)
    # Rank 0's, drawn apart from `random`, which users seed.
    number = torch.tensor([secrets.SystemRandom().random()], dtype=torch.float64, device=device)
    drawn = ranks.all_gather_scalars(number).view(-1)[0].item()
    is_whole = not dist.is_initialized() or ranks.size == dist.get_world_size()
    abort.listen(drawn if is_whole else _number_of_attempt())
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
    _check_mesh(mesh, "mesh=", device)
    shard = group_of(mesh.get_group(mesh.ndim - 1), device)
    return RankMesh(shard, group_of(mesh.get_group(0), device) if mesh.ndim == 2 else Group())


def _check_mesh(mesh: DeviceMesh, argument: str, device: torch.device) -> None:
    if mesh.get_coordinate() is None:
        raise ValueError(
            f"rank {dist.get_rank()} is not one of {argument}, whose ranks are {mesh.mesh.tolist()}: call shard on "
            "those ranks, each with its own slice"
        )
    if mesh.device_type != device.type:
        raise ValueError(
            f"{argument} is of {mesh.device_type} devices and the model goes to {device}: "
            f'use init_device_mesh("{device.type}", ...)'
        )


def _check_dimensions(
    mesh: DeviceMesh | None, tensor: Sequence[dist.ProcessGroup], pipeline: Sequence[dist.ProcessGroup]
) -> None:
    """ValueError where two groups have more than this rank in common: no rank has two parts to play."""
    data = [mesh.get_group(dim) for dim in range(mesh.ndim)] if mesh is not None else [dist.group.WORLD]
    named = [("mesh=", group) for group in data if group is not None]
    named += [("the DTensor parameters", group) for group in tensor]
    named += [("norm_over=", group) for group in pipeline]
    sets = [(name, set(_ranks_of(group))) for name, group in named]
    for index, (name, ranks) in enumerate(sets):
        for other, other_ranks in sets[:index]:
            if len(ranks & other_ranks) > 1:
                raise ValueError(
                    f"{other} and {name} have the ranks {sorted(ranks & other_ranks)} in common, where each is a "
                    'dimension of its own: make one mesh, mesh = init_device_mesh(..., mesh_dim_names=("pp", "dp", '
                    '"tp")), and give mesh=mesh["dp"], norm_over=(mesh["pp"],) and parallelize_module(model, '
                    'mesh["tp"], plan)'
                )


def _check_cover(mesh: DeviceMesh, size: int) -> None:
    """ValueError where other ranks of the mesh that `mesh` is a slice of have no part: a norm would leave them out."""
    root = mesh._get_root_mesh()
    if root.size() != size:
        raise ValueError(
            f"mesh= and the dimensions of DTensor parameters and norm_over= have {size} ranks, and the mesh that they "
            f"are slices of has {root.size()}: {root}. Name other pipeline stages by norm_over=(mesh[...],) and ranks "
            "of other data in mesh=; ranks that train a model of their own need a DeviceMesh of their own"
        )


def _ranks_of(group: dist.ProcessGroup) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group))


def _number_of_attempt() -> float:
    """For ranks that are a part of the world: the others may not be here, so all know it without an exchange."""
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT")
    return float(zlib.crc32(repr([os.environ.get(name) for name in names]).encode()))
