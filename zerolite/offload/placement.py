"""Which units' states go to the host, what that takes, and the start of the workers that will step them."""

import zlib
from pathlib import Path

import torch

from zerolite.config import Offload, master_dtype, parse_bytes, reduce_dtype
from zerolite.engine.engine import Zero
from zerolite.offload.host import Host
from zerolite.runtime import abort as alarm
from zerolite.shards.units import UnitPlan


def place(zero: Zero, plans: list[UnitPlan], dtype_of, offload: Offload) -> set[int]:
    """Numbers of the plans that go to the host; where there are any, the host is started. Collective.

    dtype_of(parameter): the dtype that it is to have. ZeroliteError where the machine has not the memory.
    """
    on_host = choose_host_units(zero, plans, dtype_of, offload)
    if on_host:
        zero.host = _start_host(zero, offload)
        needed = sum(host_bytes(zero, plans[index], dtype_of) for index in on_host)
        zero.host.check_memory(needed, "offloading gradients and parameters")
    return on_host


def choose_host_units(zero: Zero, plans: list[UnitPlan], dtype_of, offload: Offload) -> set[int]:
    """Units whose states go to the host: all or, with a budget, those that do not fit, first units fitting first."""
    if offload.budget is None:
        return {index for index, plan in enumerate(plans) if plan.is_trainable or offload.parameters}
    budget = parse_bytes(offload.budget)
    used = sum(device_bytes(zero, plan, dtype_of, offload) for plan in plans)
    if used > budget:
        raise ValueError(
            f"the parameters alone take {used:,} bytes on each rank at stage {zero.stage}, the budget is "
            f"{budget:,} bytes: raise it, use a higher stage, or Offload(parameters=True) at stage 3"
        )
    on_host: set[int] = set()
    for index, plan in enumerate(plans):
        more = device_bytes(zero, plan, dtype_of, None) - device_bytes(zero, plan, dtype_of, offload)
        if used + more <= budget:
            used += more
        elif plan.is_trainable:
            on_host.add(index)
    return on_host


def device_bytes(zero: Zero, plan: UnitPlan, dtype_of, offload: Offload | None, num_states: int = 2) -> int:
    """What a unit's model states take on the device; gathered units and gradients on their way left out."""
    total = 0
    is_away = offload is not None and plan.is_trainable
    for group in plan.groups:
        dtype = dtype_of(group.parameters[0])
        for layout in zero.layouts_of(group):
            owned = zero.owned_numel(layout)
            if not (offload is not None and offload.parameters):
                total += (layout.numel if zero.stage <= 2 or group.stays_whole else owned) * dtype.itemsize
            if plan.is_trainable and not is_away:
                master = master_dtype(dtype)
                gradients = layout.numel if zero.stage <= 1 else owned
                total += gradients * reduce_dtype(zero.precision, dtype).itemsize
                total += owned * master.itemsize * (num_states + (master != dtype))
    return total


def host_bytes(zero: Zero, plan: UnitPlan, dtype_of) -> int:
    """Host memory of a unit that workers step, the optimizer's states left out."""
    total = 0
    for group in plan.groups if plan.is_trainable or zero.host.offload.parameters else ():
        dtype = dtype_of(group.parameters[0])
        width = dtype.itemsize
        if plan.is_trainable:
            width += max(reduce_dtype(zero.precision, dtype).itemsize, 8 if dtype == torch.float64 else 0)
            width += {torch.bfloat16: 2, torch.float16: 4}.get(dtype, 0)
        total += width * sum(zero.owned_numel(layout) for layout in zero.layouts_of(group))
    return total


def _start_host(zero: Zero, offload: Offload) -> Host:
    """This rank's arena and workers, with its share of the cores of this machine. Collective."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    machines = (
        zero.gather_facts(torch.tensor([float(zlib.crc32(boot.encode()))], dtype=torch.float64)).view(-1).tolist()
    )
    here = [rank for rank, machine in enumerate(machines) if machine == machines[zero.rank]]
    alarm.listen()
    return Host(offload, zero.device, here.index(zero.rank), len(here), f"rank {zero.rank}", alarm.ring)
