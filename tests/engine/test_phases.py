"""The phases of a run, where a profiler or `ZEROLITE_TRACE` asks for them: every kind, by the unit's name."""

from __future__ import annotations

import time
from collections import OrderedDict

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile
from traces import assert_nested, spans
from zerolite_kernels import cpu

from zerolite import Offload

needs_kernels = pytest.mark.skipif(cpu.path() is None, reason="the host kernels were not built")

STEPS, BLOCKS = 2, 3
UNITS = [f"layers.{index}" for index in range(BLOCKS)]


def train(stage: int, offload: Offload | None, before=lambda: None):
    """`STEPS` steps of a few blocks; `before` them, something that is asked for in the middle of a run."""
    import zerolite

    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(layers=nn.Sequential(*(nn.Linear(48, 48) for _ in range(BLOCKS)))))
    model = zerolite.shard(model, stage=stage, offload=offload)
    optimizer = zerolite.AdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0)
    before()
    for _ in range(STEPS):
        model(torch.ones(2, 48)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def traced(folder: str, stage: int) -> tuple[float, float]:
    """When the recorded part of the run began and ended, in microseconds."""
    from zerolite.runtime import trace

    begin = time.monotonic_ns() / 1000
    model = train(stage, Offload(workers=2), before=lambda: trace.start(folder))
    model(torch.ones(2, 48))  # brings the last step back
    host = model._zerolite.placement.host
    host.wait(host.pool.submitted)
    trace.stop()
    return begin, time.monotonic_ns() / 1000


@needs_kernels
@pytest.mark.parametrize("stage", [2, 3])
def test_a_traced_run_has_every_phase_of_every_unit(ranks, tmp_path, stage):
    """One complete file a rank: kinds by unit, nested on each track, workers' spans inside the run."""
    times = ranks(2).run(traced, str(tmp_path), stage)
    for rank, (begin, end) in enumerate(times):
        found = spans(tmp_path, rank)
        assert_nested(found)
        assert all(begin <= span["ts"] and span["ts"] + span["dur"] <= end for span in found)
        trainer = {(span["cat"], span["args"]["name"]) for span in found if span["pid"] == f"rank {rank}"}
        for kind in ("all-gather", "reduce-scatter", "D2H", "worker step", "H2D"):
            assert {(kind, unit) for unit in UNITS} <= trainer, kind
        assert ("optimizer step", "AdamW") in trainer
        in_flight = {span["cat"] for span in found if span["tid"].startswith(f"{span['cat']} in flight")}
        assert {"all-gather", "reduce-scatter", "forward", "backward"} <= in_flight
        for worker in range(2):
            mine = [s for s in found if s["pid"] == f"rank {rank} worker {worker}" and s["cat"] == "worker step"]
            assert len(mine) == STEPS * BLOCKS
            assert all(any(unit in span["name"] for unit in UNITS) for span in mine)


@needs_kernels
def test_workers_step_after_they_are_asked(ranks, tmp_path):
    """Their clock is the trainer's: the n-th span of a worker begins after the n-th phase that asked for it."""
    ranks(2).run(traced, str(tmp_path), 2)
    found = [span for span in spans(tmp_path) if span["cat"] == "worker step"]
    asked = [span["ts"] for span in found if span["pid"] == "rank 0"]
    for worker in range(2):
        began = [span["ts"] for span in found if span["pid"] == f"rank 0 worker {worker}"]
        assert len(began) == len(asked)
        assert all(ask < begin for ask, begin in zip(sorted(asked), sorted(began), strict=True))


def profiled(stage: int) -> list[str]:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        train(stage, None)
    dist.barrier()
    return [event.key for event in profiler.key_averages()]


def test_a_profiler_shows_the_phases(ranks):
    """Without offload: communication and the step, by unit."""
    for keys in ranks(2).run(profiled, 3):
        for kind in ("all-gather", "reduce-scatter", "optimizer step"):
            assert {f"zerolite::{kind} ({unit})" for unit in UNITS} <= set(keys)
