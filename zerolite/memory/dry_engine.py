"""The engine without a machine: its own units, buckets, shards and walk on tensors without memory, as one of N ranks.

Nothing of ZeRO is written a second time here. Units are planned, cut and placed by the functions that `zerolite.shard`
calls, buckets are made by `engine.build`, gathers and reductions run through `Engine`, `Reducer`, `FlatGradients` and
the shards. What stands in for the machine are a device whose tensors are on meta, groups that count what they would
send, and an arena that counts what it would allocate.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from zerolite_kernels.cpu.command import PARTIAL_NUMEL

from zerolite.config import Offload
from zerolite.engine.build import make_buckets
from zerolite.engine.engine import Engine
from zerolite.offload.arena import SharedTensor, whole_pages
from zerolite.offload.fetch import FetchQueue
from zerolite.offload.host import whole_blocks
from zerolite.offload.placement import Placement, Policy, choose_host_units
from zerolite.runtime.collectives import Group, Pending
from zerolite.runtime.device import Cpu
from zerolite.runtime.mesh import RankMesh
from zerolite.shards.bucket import Unit
from zerolite.shards.units import ParameterGroup, UnitPlan

META = torch.device("meta")


@dataclass
class Traffic:
    """What one rank sends in a step: bytes to other ranks by kind, bytes over the bus to and from the host."""

    reduce_bytes: int = 0
    gather_bytes: int = 0
    replica_bytes: int = 0  # summed over replicas of a 2-D mesh
    to_host_bytes: int = 0
    to_device_bytes: int = 0
    num_collectives: int = 0

    @property
    def sent_bytes(self) -> int:
        return self.reduce_bytes + self.gather_bytes + self.replica_bytes

    @property
    def bus_bytes(self) -> int:
        return self.to_host_bytes + self.to_device_bytes


class DryDevice(Cpu):
    """Copies between device and host are counted, not made."""

    def __init__(self, traffic: Traffic):
        super().__init__()
        self.device, self.traffic = META, traffic
        self.on_host: set[int] = set()  # storages of the arena

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if target.untyped_storage()._cdata in self.on_host:
            self.traffic.to_host_bytes += source.nbytes
        else:
            self.traffic.to_device_bytes += source.nbytes


class DryGroup(Group):
    """Rank 0 of `size` ranks; collectives send nothing, and are counted."""

    def __init__(self, size: int, traffic: Traffic, receives_apart: bool):
        """receives_apart: a reduction receives its terms into memory of its own, as over gloo; NCCL does not."""
        self.rank, self.size = 0, size
        self.traffic, self.receives_apart = traffic, receives_apart

    def reduce_scatter(self, full, out, divisor, label):
        if self.size == 1:
            return super().reduce_scatter(full, out, divisor, label)
        self.traffic.reduce_bytes += full.nbytes // self.size * (self.size - 1)
        self.traffic.num_collectives += 1
        received = (
            torch.empty_like(full[: full.numel() // self.size * (self.size - 1)]) if self.receives_apart else None
        )
        return Pending((), (full, out, received), label)

    def all_gather(self, full, shard, label):
        if self.size == 1:
            return super().all_gather(full, shard, label)
        self.traffic.gather_bytes += full.nbytes // self.size * (self.size - 1)
        self.traffic.num_collectives += 1
        return Pending((), (full, shard), label)

    def all_reduce(self, tensor):
        if self.size > 1:  # a ring sends each element twice, less a share
            self.traffic.replica_bytes += 2 * tensor.nbytes * (self.size - 1) // self.size
            self.traffic.num_collectives += 1


class DryArena:
    def __init__(self):
        self.nbytes = self.pinned_bytes = 0


class DryPool:
    def num_done(self) -> int:
        return 1 << 62


class DryHost:
    """What `offload` calls of a `Host`: memory is counted, commands are dropped."""

    states_fd = -1  # states of a drive are counted by `walk`, none are written

    def __init__(self, offload: Offload, device: DryDevice):
        self.offload, self.device = offload, device
        self.d2h_stream = self.h2d_stream = None
        self.arena, self.pool, self.fetch_queue = DryArena(), DryPool(), FetchQueue()
        self.free_tensors: defaultdict[tuple[int, torch.dtype], list[SharedTensor]] = defaultdict(list)
        self.states_bytes = 0
        self._kept: list[torch.Tensor] = []
        self._scratch = torch.zeros(0, dtype=torch.float64)
        self.leave_out: Callable[[torch.Tensor], None] = lambda tensor: None  # told of what is no device memory

    def allocate(self, numel: int, dtype: torch.dtype, is_copied: bool = False) -> SharedTensor:
        values = torch.empty(numel, dtype=dtype, device=META)
        self.leave_out(values)
        shared = SharedTensor(self.arena.nbytes, values)
        self.arena.nbytes += whole_pages(numel, dtype)
        if is_copied:
            self.arena.pinned_bytes += whole_pages(numel, dtype)
        self.device.on_host.add(values.untyped_storage()._cdata)
        self._kept.append(values)  # so that no other storage gets its address
        return shared

    @property
    def has_drive(self) -> bool:
        """Whether states lie on a drive."""
        return self.offload.path is not None

    def keep_in_file(self, shard_numel: int, num_shards: int, itemsize: int) -> None:
        """Count one state of a shard on the drive."""
        self.states_bytes += num_shards * whole_blocks(shard_numel, itemsize)

    def scratch(self, numel: int) -> SharedTensor:
        """As `Host.scratch`; these have values, zeros, since who asked for them adds them up."""
        numel = max(numel, PARTIAL_NUMEL)
        if numel > self._scratch.numel():
            self.allocate(numel, torch.float64)
            self._scratch = torch.zeros(numel, dtype=torch.float64)
            self.leave_out(self._scratch)
        return SharedTensor(0, self._scratch)

    def submit(self, commands, label: str) -> int:
        return 0

    def wait(self, fence: int) -> None:
        pass

    def check_memory(self, needed_bytes: int, what: str) -> None:
        pass


class DryEngine(Engine):
    """An engine whose backward is told, not run: nobody calls back at its end."""

    traffic: Traffic
    host: DryHost  # of what is offloaded, if anything is

    def open_backward(self) -> None:
        self._is_backward_open = True
        self.fetch()
        self.reducer.begin_backward()
        if self.loss_scale is not None:
            self.mark_loss_scaled()


def dry_engine(
    plans: Sequence[UnitPlan],
    policy: Policy,
    offload: Offload | None,
    num_replicas: int,
    receives_apart: bool,
) -> DryEngine:
    """The engine of rank 0 of `policy.world_size` ranks that shard, times replicas, with every bucket made.

    ValueError as of `choose_host_units`.
    """
    traffic = Traffic()
    mesh = RankMesh(
        DryGroup(policy.world_size, traffic, receives_apart), DryGroup(num_replicas, traffic, receives_apart)
    )
    engine = DryEngine(nn.Module(), policy.partition, mesh, torch.device("cpu"), policy.precision)
    device = DryDevice(traffic)
    engine.device, engine.traffic = device, traffic
    engine.host = DryHost(offload or Offload(), device)
    units = choose_host_units(plans, policy, offload) if offload is not None else frozenset()
    if units:
        host: Any = engine.host
        engine.placement = Placement(host, units, host.fetch_queue)
        engine.fetch_queue = engine.placement.fetch_queue
    for index, plan in enumerate(plans):
        unit = Unit(plan.name, plan.module, index, is_root(plan))
        for group in plan.groups:
            dtype = policy.dtype_of(group.parameters[0])
            for bucket in make_buckets(engine, unit, _on_meta(group, dtype), dtype, has_values=False):
                unit.add(bucket)
        engine.units.append(unit)
        engine.reducer.add(unit.buckets)
    return engine


def is_root(plan: UnitPlan) -> bool:
    """Whether the unit is of the whole model's module."""
    return plan.name == "(root)"


def _on_meta(group: ParameterGroup, dtype: torch.dtype) -> ParameterGroup:
    """The group with stand-ins for its parameters, which stay as they are."""
    stand_ins = [
        nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=META), requires_grad=group.is_trainable)
        for parameter in group.parameters
    ]
    return replace(group, parameters=stand_ins, is_on_meta=True)
