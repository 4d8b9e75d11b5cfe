"""Which units' shards lie on the host, what that costs, and the start of the workers that step them."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from zerolite.config import Offload, Precision, master_dtype, parse_bytes, reduce_dtype
from zerolite.offload.arena import memory_group
from zerolite.offload.fetch import FetchQueue
from zerolite.offload.host import Host, LocalRanks
from zerolite.offload.host_shard import HostShard
from zerolite.offload.shard_memory import rounded
from zerolite.runtime import abort
from zerolite.runtime.device import Device
from zerolite.runtime.mesh import RankMesh
from zerolite.runtime.rank_settings import digest_of
from zerolite.shards.layout import Partition
from zerolite.shards.shard import BucketSpec, DeviceShard, Shard
from zerolite.shards.units import ParameterGroup, UnitPlan, layouts_of

DtypeOf = Callable[[nn.Parameter], torch.dtype]  # the dtype that a parameter is to have


@dataclass(frozen=True)
class Policy:
    """What decides the bytes of a unit: how the model is cut, and into which dtypes."""

    partition: Partition
    world_size: int  # ranks that shard
    precision: Precision | None
    dtype_of: DtypeOf


@dataclass
class Placement:
    """Where the shards of one model lie; without offload all on the device."""

    host: Host | None = None
    units: frozenset[int] = frozenset()  # whose trainable shards lie on the host
    fetch_queue: FetchQueue = field(default_factory=FetchQueue)

    def streams(self, group: ParameterGroup) -> bool:
        """Whether the group's parameters lie on the host too, and each gather begins there."""
        return self.host is not None and self.host.offload.parameters and not group.stays_unsharded

    def keeps_gradient_on_device(self, unit_index: int, group: ParameterGroup) -> bool:
        return not (group.is_trainable and unit_index in self.units)

    def new_shard(
        self, unit_index: int, group: ParameterGroup, spec: BucketSpec, staging: torch.Tensor, stays_unsharded: bool
    ) -> tuple[Shard, torch.Tensor]:
        """The bucket's shard, and the unsharded buffer in the parameters' dtype.

        staging: (layout.numel,), the bucket's values in `spec.stepped_dtype`.
        """
        is_stepped_here = self.keeps_gradient_on_device(unit_index, group)
        if self.host is None or (is_stepped_here and not self.streams(group)):
            unsharded = staging.to(spec.dtype)
            return DeviceShard(spec, staging, unsharded, stays_unsharded), unsharded
        unsharded = rounded(staging, spec.dtype)
        shard = HostShard(spec, self.host, staging, unsharded, stays_unsharded)
        self.fetch_queue.add(shard, unit_index)
        return shard, unsharded

    def check_memory(self, needed_bytes: int, what: str) -> None:
        """ZeroliteError, with both sizes, where this machine cannot give its ranks so much host memory each."""
        if self.host is not None:
            self.host.check_memory(max(needed_bytes - self.host.free_bytes, 0), what)

    @property
    def offload(self) -> Offload | None:
        """What the user has asked for; None where all lies on the device."""
        return self.host.offload if self.host is not None else None

    @property
    def pinned_bytes(self) -> int:
        """Of `host_bytes`, locked for copies."""
        return self.host.arena.pinned_bytes if self.host is not None else 0

    @property
    def host_bytes(self) -> int:
        """Host memory that is offloaded to: gradients, parameters, masters, states, and what workers need beside."""
        return self.host.arena.nbytes if self.host is not None else 0

    @property
    def file_bytes(self) -> int:
        return self.host.states_bytes if self.host is not None else 0


def place(
    plans: Sequence[UnitPlan], policy: Policy, offload: Offload | None, device: Device, mesh: RankMesh
) -> Placement:
    """Choose the units that go to the host and, where there are any, start its workers. Collective.

    ValueError for a budget that the parameters alone exceed; ZeroliteError where the machine has not the memory.
    """
    if offload is None:
        return Placement()
    units = choose_host_units(plans, policy, offload)
    local = local_ranks(mesh, device)  # of every rank, one whose pipeline stage fits its device, too
    if not units:
        return Placement()
    host = Host(offload, device, local, f"rank {local.number}", abort.publish)
    needed = sum(host_bytes(plans[index], policy, offload) for index in units)
    host.check_memory(needed, "offloading gradients and parameters")
    return Placement(host, units, host.fetch_queue)


def choose_host_units(plans: Sequence[UnitPlan], policy: Policy, offload: Offload) -> frozenset[int]:
    """Units whose states go to the host: all or, with a budget, those that do not fit, first units fitting first."""
    if offload.budget is None:
        return frozenset(index for index, plan in enumerate(plans) if plan.is_trainable or offload.parameters)
    budget = parse_bytes(offload.budget)
    used = sum(device_bytes(plan, policy, offload) for plan in plans)
    if used > budget:
        raise ValueError(
            f"the parameters alone take {used:,} bytes on each rank at stage {policy.partition.stage}, the budget is "
            f"{budget:,} bytes: raise it, use a higher stage, or Offload(parameters=True) at stage 3"
        )
    on_host: set[int] = set()
    for index, plan in enumerate(plans):
        more = device_bytes(plan, policy, None) - device_bytes(plan, policy, offload)
        if used + more <= budget:
            used += more
        elif plan.is_trainable:
            on_host.add(index)
    return frozenset(on_host)


def device_bytes(plan: UnitPlan, policy: Policy, offload: Offload | None, num_states: int = 2) -> int:
    """A unit's model states on the device; gathered units and gradients in flight are left out."""
    total = 0
    for group in plan.groups:
        dtype = policy.dtype_of(group.parameters[0])
        for layout in layouts_of(group, policy.world_size):
            owned = policy.partition.owned_numel(layout)
            if not (offload is not None and offload.parameters):
                stays = group.stays_unsharded or not policy.partition.shards_parameters
                total += (layout.numel if stays else owned) * dtype.itemsize
            if group.is_trainable and offload is None:
                master = master_dtype(dtype)
                gradients = owned if policy.partition.shards_gradients else layout.numel
                total += gradients * reduce_dtype(policy.precision, dtype).itemsize
                total += owned * master.itemsize * (num_states + (master != dtype))
    return total


def host_bytes(plan: UnitPlan, policy: Policy, offload: Offload) -> int:
    """Host memory of a unit that workers step, the optimizer's states left out."""
    total = 0
    for group in plan.groups:
        if not (group.is_trainable or offload.parameters):
            continue
        dtype = policy.dtype_of(group.parameters[0])
        width = dtype.itemsize
        if group.is_trainable:
            width += max(reduce_dtype(policy.precision, dtype).itemsize, 8 if dtype == torch.float64 else 0)
            width += {torch.bfloat16: 2, torch.float16: 4}.get(dtype, 0)
        total += width * sum(policy.partition.owned_numel(layout) for layout in layouts_of(group, policy.world_size))
    return total


def local_ranks(mesh: RankMesh, device: Device) -> LocalRanks:
    """Who shares this machine with this rank, of all ranks of the model, whatever they shard. Collective.

    Containers of one machine (pods) have one boot_id, and may have cores and a limit of memory of their own.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    keys = (f"{boot} {sorted(os.sched_getaffinity(0))}", f"{boot} {memory_group()}")
    own = [digest_of(key) for key in keys]
    ranks = mesh.all_ranks(device.device)
    number, _ = ranks.place()
    rows = ranks.all_gather_scalars(torch.tensor(own, dtype=torch.float64)).tolist()
    sharing_cores = [rank for rank, row in enumerate(rows) if row[0] == own[0]]
    sharing_memory = [rank for rank, row in enumerate(rows) if row[1] == own[1]]
    return LocalRanks(number, sharing_cores.index(number), len(sharing_cores), len(sharing_memory))
