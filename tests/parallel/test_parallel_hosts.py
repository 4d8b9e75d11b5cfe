"""Are cores and memory of a machine shared by all ranks of a model, also those of other stages and parts?"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from zerolite.offload import placement
from zerolite.offload.host import LocalRanks
from zerolite.runtime import device as devices
from zerolite.runtime.mesh import mesh_of


def count(masks: list[set[int]], groups: list[str]) -> LocalRanks:
    """On a 2 x 1 x 2 mesh, as if each rank had these cores and this control group."""
    rank, device = dist.get_rank(), torch.device("cpu")
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("pp", "dp", "tp"))
    ranks = mesh_of(mesh["dp"], device, [mesh["tp"].get_group()], (mesh["pp"],))
    own = os.sched_getaffinity, placement.memory_group
    os.sched_getaffinity, placement.memory_group = lambda pid: masks[rank], lambda: groups[rank]
    try:
        return placement.local_ranks(ranks, devices.of(device))
    finally:
        os.sched_getaffinity, placement.memory_group = own


def count_all() -> list[LocalRanks]:
    return [
        count([{0, 1}] * 4, [""] * 4),  # one machine, whatever the ranks shard
        count([{0}, {0}, {1}, {1}], ["a", "a", "b", "b"]),  # two pods of one machine
        count([{0}, {1}, {2}, {3}], [""] * 4),  # pinned by hand: cores of their own, the machine's memory
    ]


def test_ranks_of_every_dimension_share_a_machine(ranks):
    for rank, (machine, pods, pinned) in enumerate(ranks(4).run(count_all)):
        assert machine == LocalRanks(rank, rank, 4, 4)
        assert pods == LocalRanks(rank, rank % 2, 2, 2)
        assert pinned == LocalRanks(rank, 0, 1, 4)
