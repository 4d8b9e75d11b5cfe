"""Do training loops that know only torch's names, p.grad among them, train a sharded model as they train DDP's?"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from hand_loops import LOOPS, OPTIONS, Setting, build
from models import assert_close, assert_same_bits, whole
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

import zerolite

Run = tuple[dict[str, torch.Tensor], list[float]]


def by_torch(loop: str) -> Run:
    """On a rank: the loop on DDP, on one process on the model itself."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = build()
    setting = Setting(model, model, torch.optim.AdamW(model.parameters(), **OPTIONS), rank, world)
    if world > 1:
        setting.forward = ddp = DistributedDataParallel(model)
        setting.no_sync = ddp.no_sync
    logged = LOOPS[loop](setting)
    return whole(model), logged


def by_zerolite(loop: str, stage: int, dtype=torch.float64, offload: str | None = None, mesh=None) -> Run:
    model = zerolite.shard(build(dtype), stage=stage, offload=offload, mesh=mesh)
    setting = Setting(
        model, model, zerolite.AdamW(model.parameters(), **OPTIONS), dist.get_rank(), dist.get_world_size(),
        partial(zerolite.no_sync, model), partial(zerolite.full_params, model),
    )  # fmt: skip
    logged = LOOPS[loop](setting)
    with zerolite.full_params(model):
        return whole(model), logged


def everywhere(loops: list[str]) -> list[tuple[str, Run, list[Run]]]:
    return [(loop, by_torch(loop), [by_zerolite(loop, stage) for stage in range(4)]) for loop in loops]


@pytest.mark.parametrize("world", [1, 2])
def test_loops_of_torch_train_alike_at_every_stage(ranks, world):
    """Parameters and what the loop logged, to 1e-12, against DDP in fp64; one bit pattern across stages' parameters."""
    for results in ranks(world).run(everywhere, list(LOOPS)):
        for loop, (expected, expected_log), runs in results:
            for stage, (parameters, logged) in enumerate(runs):
                try:
                    assert_close(parameters, expected, rtol=1e-12, atol=1e-13)
                    assert logged == pytest.approx(expected_log, rel=1e-12), "what it logged"
                    assert_same_bits(parameters, runs[0][0])
                    assert logged == runs[0][1], "what it logged, by stage"
                except AssertionError as error:
                    raise AssertionError(f"{loop} at stage {stage}: {error}") from error


def on_replicas_of_shards(loops: list[str]) -> list[tuple[str, Run, list[Run]]]:
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return [(loop, by_torch(loop), [by_zerolite(loop, stage, mesh=mesh) for stage in (1, 3)]) for loop in loops]


def test_loops_of_torch_train_alike_on_replicas_of_shards(ranks):
    """On a mesh of two dimensions: clips of parts, norms, gradients scaled and cleared, Inf on one rank."""
    loops = ["clipped_in_part_and_again", "norms_logged", "accumulated", "cleared_in_part", "overflow_on_one_rank"]
    for results in ranks(4).run(on_replicas_of_shards, loops):
        for loop, (expected, expected_log), runs in results:
            for parameters, logged in runs:
                assert logged == pytest.approx(expected_log, rel=1e-12), loop
                assert_close(parameters, expected, rtol=1e-12, atol=1e-13)


def cleared_in_part_with_norm(offload: str | None) -> float:
    """The norm that a step finds once some of a reduced gradient was set to zero."""
    model = zerolite.shard(build(torch.float32), stage=1, offload=offload)
    optimizer = zerolite.AdamW(model.parameters(), **OPTIONS)
    model(torch.ones(2, 5)).square().sum().backward()
    model.last.weight.grad.zero_()
    optimizer.step()
    assert optimizer.grad_norm is not None and model.last.weight.grad.norm() == 0
    return optimizer.grad_norm


def norms_with_and_without_offload() -> list[float]:
    return [cleared_in_part_with_norm(offload) for offload in (None, "cpu")]


def test_a_norm_that_came_with_the_gradient_is_not_used_after_an_edit(ranks):
    for plain, offloaded in ranks(2).run(norms_with_and_without_offload):
        assert plain == offloaded


def with_and_without_offload(loops: list[str]) -> list[tuple[str, Run, Run]]:
    return [
        (loop, by_zerolite(loop, stage, torch.float32), by_zerolite(loop, stage, torch.float32, "cpu"))
        for loop, stage in zip(loops, [0, 3, 2, 1, 3], strict=True)
    ]


def test_offload_changes_no_bit_of_a_loop(ranks):
    loops = ["clipped_in_part_and_again", "nano_gpt", "accumulated", "cleared_in_part", "overflow_on_one_rank"]
    for results in ranks(2).run(with_and_without_offload, loops):
        for loop, (expected, expected_log), (parameters, logged) in results:
            assert logged == expected_log, loop
            assert_same_bits(parameters, expected)


class Routed(nn.Module):
    """Each rank uses an expert of its own; nobody uses the last."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 4)
        self.experts = nn.ModuleList(nn.Linear(4, 3) for _ in range(3))

    def forward(self, x, expert: int):
        return self.experts[expert](self.first(x))


def routed(stage: int | None):
    """A clip of what no rank sees whole; by DDP where there is no stage."""
    torch.manual_seed(0)
    model = Routed().double()
    make: type = torch.optim.AdamW if stage is None else zerolite.AdamW
    if stage is None:
        forward: nn.Module = DistributedDataParallel(model, find_unused_parameters=True)
    else:
        forward = zerolite.shard(model, stage=stage)
    optimizer = make(model.parameters(), **OPTIONS)
    norms = []
    for _ in range(2):
        forward(torch.ones(2, 5).double(), dist.get_rank()).square().sum().backward()
        norms.append(clip_grad_norm_(model.parameters(), 0.1).item())
        optimizer.step()
        optimizer.zero_grad()
    return whole(model), norms


def routed_everywhere():
    return [routed(stage) for stage in (None, 0, 1, 2)]


def test_a_clip_counts_parameters_that_another_rank_used(ranks):
    for (expected, norms), *runs in ranks(2).run(routed_everywhere):
        for parameters, found in runs:
            assert found == pytest.approx(norms, rel=1e-12)
            assert_close(parameters, expected, rtol=1e-12, atol=1e-14)


def autocast_everywhere() -> list[dict[str, torch.Tensor]]:
    """AMP in fp32, on one rank: both compute the same gradients."""
    results = []
    for stage in (None, 0, 3):
        model = build(torch.float32)
        make: type = torch.optim.AdamW if stage is None else zerolite.AdamW
        if stage is not None:
            zerolite.shard(model, stage=stage)
        setting = Setting(model, model, make(model.parameters(), **OPTIONS), 0, 1)
        LOOPS["nano_gpt"](setting)
        results.append(whole(model))
    return results


def test_autocast_trains_as_in_torch(ranks):
    ((expected, *runs),) = ranks(1).run(autocast_everywhere)
    for parameters in runs:
        assert_close(parameters, expected, rtol=1e-6, atol=1e-7)
