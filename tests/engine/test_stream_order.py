"""On a GPU, is every read and write behind what it depends on? Shown on the CPU, on a simulated device."""

from __future__ import annotations

import gc
import itertools
from typing import NamedTuple

import crosses
import pytest
import torch
from models import Block, drawn
from mutants import mutated, replaced
from simulated_device import simulated
from torch import nn
from torch.utils.checkpoint import checkpoint

import zerolite
from zerolite.offload.host_shard import HostShard
from zerolite.runtime.collectives import NcclGroup
from zerolite.shards import units
from zerolite.shards.gradients import FlatGradients
from zerolite.shards.parameters import FlatParameters
from zerolite.shards.shard import DeviceShard

WIDTH = 12


class Scenario(NamedTuple):
    mesh: tuple[int, int] = (2, 1)  # shards, replicas
    stage: int = 3
    offload: str = "none"
    accumulation: str = "none"
    checkpointing: bool = False
    between: str = "nothing"  # what else runs than forward, backward and step
    param: torch.dtype = torch.float32

    @property
    def is_possible(self) -> bool:
        return self.stage == 3 or self.offload != "parameters"

    def __str__(self) -> str:
        return "-".join(map(str, self))


class Net(nn.Module):
    def __init__(self, is_checkpointed: bool):
        super().__init__()
        self.is_checkpointed = is_checkpointed
        self.first = nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(3))
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.is_checkpointed else block(x)
        return self.last(x)


OFFLOADS = {
    "none": None,
    "optimizer": zerolite.Offload(threads=1),
    "parameters": zerolite.Offload(parameters=True, threads=1),
    "budget": zerolite.Offload(budget=24_000, threads=1),
}


def train(scenario: Scenario) -> set[str]:
    """Two clipped steps, all of which change parameters; what the checker finds."""
    torch.manual_seed(0)
    with replaced(units, "BUCKET_NUMEL", 512), simulated(*scenario.mesh) as order:
        model = drawn(lambda: Net(scenario.checkpointing))
        precision = zerolite.Precision(scenario.param)
        model = zerolite.shard(model, scenario.stage, None, OFFLOADS[scenario.offload], precision)
        optimizer = zerolite.AdamW(model.parameters(), lr=1e-3, max_grad_norm=0.1)
        for _ in range(2):
            turns = 1 if scenario.accumulation == "none" else 2
            for turn in range(turns):
                x = torch.randn(4, 5)
                with zerolite.no_sync(model, enabled=scenario.accumulation == "no_sync" and turn == 0):
                    model(x).square().mean().backward()
            if scenario.between in ("forward", "writeback"):
                with torch.no_grad():
                    model(torch.randn(4, 5))
            if scenario.between == "writeback":
                with zerolite.full_params(model, writeback=True), torch.no_grad():
                    for parameter in model.parameters():
                        parameter.mul_(0.5)
            optimizer.step()
            assert not optimizer.step_was_skipped
            optimizer.zero_grad()
            if scenario.between == "forward":
                model.eval()(torch.randn(4, 5))
                model.train()
        if scenario.offload == "budget":
            assert 0 < len(model._zerolite.placement.units) < len(model._zerolite.units)
        with zerolite.full_params(model):
            assert all(parameter.isfinite().all() for parameter in model.parameters())
        del model, optimizer, x
        gc.collect()
        assert order.num_operations > 500
        return order.findings


SCENARIOS = [
    scenario
    for scenario in itertools.starmap(
        Scenario,
        itertools.product(
            [(1, 1), (2, 1), (2, 2)],
            range(4),
            OFFLOADS,
            ["none", "no_sync", "reduced"],
            [False, True],
            ["nothing", "forward", "writeback"],
            [torch.float32, torch.bfloat16],
        ),
    )
    if scenario.is_possible
]


@pytest.mark.parametrize("scenario", SCENARIOS if crosses.FULL else crosses.cover(SCENARIOS), ids=str)
def test_every_access_is_behind_what_it_depends_on(scenario):
    """Reads and writes of every stream, of NCCL and of the workers, and the ends of allocations: none is a race."""
    assert train(scenario) == set()


# Each takes one order away: class, method, what it reads and what it would read.
MUTANTS = {
    "compute runs on beside a reduction": (FlatGradients, "finish_reduce", "spec.device.wait(event)", "pass"),
    "a reduction begins before its gradients are written": (FlatGradients, "start_reduce", ", after_current=True", ""),
    "a reduce-scatter is not waited for": (FlatGradients, "finish_reduce", "pending.wait()", "pass"),
    "the last sum is freed while it is added": (DeviceShard, "accumulate", "return previous", "return None"),
    "an all-gather is not waited for": (FlatParameters, "wait", "self.pending.wait()", "pass"),
    "NCCL's all-gather orders nobody": (NcclGroup, "all_gather", "(work.wait,)", "()"),
    "NCCL's reduce-scatter orders nobody": (NcclGroup, "reduce_scatter", "((work.wait,)", "(()"),
    "a sum is divided before it is there": (NcclGroup, "reduce_scatter", "(work.wait, lambda", "(bool, lambda"),
    "a copy to the device begins before its memory is free": (HostShard, "gather", ", after_current=True", ""),
    "streamed parameters are read before they are copied": (HostShard, "_gather", "device.wait(event)", "None"),
    "a copy to the device overwrites what is read": (
        HostShard,
        "start_h2d",
        "device.wait(readers_done)",
        "device",
    ),
    "a copy to the device reads what workers write": (HostShard, "start_h2d", "self.memory.wait()", "pass"),
    "parameters are read before they are copied": (HostShard, "start_fetch", "self.host.device.wait(*event)", "None"),
    "workers write what a copy to the device reads": (
        HostShard,
        "_finish_h2d",
        "self.host.device.synchronize(*self._h2d_event)",
        "pass",
    ),
    "a copy to the host begins before the reduction ends": (HostShard, "accumulate", ", after_current=True", ""),
    "a copy to the host overwrites what workers read": (HostShard, "accumulate", "self.memory.wait()  #", "pass  #"),
    "a gradient is freed while it is copied": (HostShard, "release", "self.host.device.wait(self._d2h_event)", "pass"),
    "workers add up what is still copied": (
        HostShard,
        "_add_staged",
        "self.host.device.synchronize(self._d2h_event)",
        "pass",
    ),
    "workers step on what is still copied": (
        HostShard,
        "_gradient",
        "self.host.device.synchronize(self._d2h_event)",
        "pass",
    ),
    "a norm's terms are freed between two streams": (
        HostShard,
        "accumulate",
        "else self._squares.copy_(term)",
        "else setattr(self, '_squares', term)",
    ),
}
SEEING = [
    Scenario((2, 1), 1, "optimizer", "reduced", between="writeback", param=torch.bfloat16),
    Scenario((1, 1), 3, "parameters", "reduced", between="forward"),
    Scenario((2, 1), 3, "parameters", between="forward"),
    Scenario((2, 2), 2, "none", "reduced"),
    Scenario((1, 1), 1, "optimizer", between="forward"),
]


@pytest.mark.parametrize("name", MUTANTS)
def test_an_order_that_is_taken_away_is_missed(name):
    """The checker sees each of these, in one scenario or another."""
    with mutated(*MUTANTS[name]):
        assert any(train(scenario) for scenario in SEEING)
