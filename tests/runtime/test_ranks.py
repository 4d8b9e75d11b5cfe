"""The rank pool itself: results in order, errors with rank and traceback, and no hang that outlives its timeout."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from ranks import Pool, RankError, RankTimeout
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor


def total(value: int) -> tuple[int, int, int]:
    tensor = torch.tensor([value + dist.get_rank()])
    dist.all_reduce(tensor)
    return dist.get_rank(), dist.get_world_size(), int(tensor)


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise KeyError("mine")
    dist.barrier()


def hang_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(3600)


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(7)


def say(text: str) -> None:
    print(text)


def groups_of_a_mesh(groups_before: int) -> int:
    """How many groups the mesh of a DTensor resolves that has gone through a function whose result DTensor keeps."""
    for _ in range(groups_before):
        dist.new_group([0, 1])
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    whole = distribute_tensor(torch.ones(2, 2), mesh["tp"])
    return len(whole.double().device_mesh.get_all_groups())


def alone() -> tuple[bool, int]:
    return dist.is_initialized(), torch.get_num_threads()


@pytest.mark.parametrize("world", [3, 1, 4, 2])
def test_results_come_in_rank_order_from_groups_of_any_size(ranks, world):
    expected = sum(range(10, 10 + world))
    assert ranks(world).run(total, 10) == [(rank, world, expected) for rank in range(world)]


def test_a_world_has_its_own_meshes(ranks):
    """An equal mesh of the world before in the same processes had groups of other names."""
    assert [ranks(4).run(groups_of_a_mesh, groups_before) for groups_before in (9, 0)] == [[1] * 4] * 2


def test_without_torch_distributed(ranks):
    assert ranks(1, distributed=False).run(alone) == [(False, 1)]


def test_what_a_rank_prints_is_captured(capfd):
    pool = Pool()
    try:
        pool(1, distributed=False).run(say, "from a rank")
    finally:
        pool.close()
    assert "from a rank" in capfd.readouterr().out


def test_an_error_names_its_rank_and_a_hang_ends():
    pool = Pool()
    try:
        with pytest.raises(RankError, match="(?s)rank 1: KeyError: 'mine'.*in fail_on"):
            pool(2).run(fail_on, 1)
        assert len(pool(2).run(total, 0)) == 2
        with pytest.raises(RankError, match="rank 0: ProcessDied: exit 7"):
            pool(2).run(die_on, 0)
        assert len(pool(2).run(total, 0)) == 2
        pool.ranks[1].process.kill()
        pool.ranks[1].process.wait()
        assert len(pool(2).run(total, 0)) == 2
        with pytest.raises(RankTimeout, match=r"ranks \[1\] of 2"):
            pool(2, timeout=0.5).run(hang_on, 1)
        assert len(pool(2).run(total, 0)) == 2
    finally:
        pool.close()
