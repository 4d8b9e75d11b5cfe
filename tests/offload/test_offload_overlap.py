"""The host's step hides behind the next forward, and no more crosses the bus than 16-bit gradients and parameters."""

from __future__ import annotations

import time

import pytest
import torch
from delays import slow_workers
from models import joint_batch, llama, loss_of, part
from saved import rank, world
from torch import nn
from zerolite_kernels import cpu

from zerolite import Offload

pytestmark = pytest.mark.skipif(cpu.path() is None, reason="the host kernels were not built")

BLOCKS, STEP_S, FORWARD_S = 60, 0.006, 0.008


class Late(nn.Linear):
    """A layer whose forward takes its time."""

    def forward(self, x):
        time.sleep(FORWARD_S)
        return super().forward(x)


def exposed(stage: int, offload: Offload) -> tuple[float, float]:
    """Seconds in `step` and in waiting for workers until the end of the next forward; and seconds that they work.

    The root has no parameters, so the first block is all that nothing hides. Waiting is counted where it happens:
    differences of two runs would be noise on a busy machine.
    """
    import zerolite

    with slow_workers(STEP_S, is_fixed=True):
        model = zerolite.shard(nn.Sequential(*(Late(16, 16) for _ in range(BLOCKS))), stage=stage, offload=offload)
    optimizer = zerolite.AdamW(model.parameters(), lr=1e-3)
    pool, waits = model._zerolite.placement.host.pool, []
    wait = pool.wait

    def timed(work, *arguments):
        start = time.monotonic()
        result = work(*arguments)
        waits.append(time.monotonic() - start)
        return result

    out, found = model(torch.ones(1, 16)), []
    pool.wait = lambda number: timed(wait, number)
    for _ in range(4):  # one undisturbed by others shows it; where nothing hides, none is
        optimizer.zero_grad()
        out.sum().backward()
        waits.clear()
        timed(optimizer.step)
        out = model(torch.ones(1, 16))
        found.append(sum(waits))
    optimizer.zero_grad()
    out.sum().backward()
    waits.clear()
    timed(optimizer.step)
    pool.wait(pool.submitted)
    return min(found), sum(waits)


@pytest.mark.parametrize(
    "number, stage, offload", [(1, 0, Offload()), (2, 1, Offload()), (2, 3, Offload(parameters=True))]
)
def test_the_step_on_the_host_hides_behind_the_next_forward(ranks, number, stage, offload):
    """Of all but the first units: what is exposed is under a tenth of what the workers take."""
    for waited, worked in ranks(number).run(exposed, stage, offload):
        assert worked > 0.9 * BLOCKS * STEP_S, "the workers took their time"
        assert waited < 0.1 * worked


def crossings(stage: int, offload: Offload, accumulation: int, no_sync: bool):
    """Bytes that copies between device and host move in each of three steps: (down, up)."""
    import zerolite
    from zerolite.runtime.device import Cpu

    bf16 = torch.bfloat16
    model = zerolite.shard(llama(hidden=64), stage=stage, offload=offload, precision=zerolite.Precision(bf16, bf16))
    optimizer = zerolite.AdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0)
    buckets = [bucket for unit in model._zerolite.units for bucket in unit.buckets]
    gradients = {bucket.shard.memory.gradient.values.data_ptr() for bucket in buckets}
    parameters = {bucket.shard.memory.parameter.values.data_ptr() for bucket in buckets}
    moved, copy = [], Cpu.copy

    def count(device, target, source) -> None:
        down, up = target.data_ptr() in gradients, source.data_ptr() in parameters
        assert down != up and target.dtype == source.dtype == bf16
        moved[-1][up] += source.nbytes
        copy(device, target, source)

    Cpu.copy = count
    try:
        for step in range(3):
            moved.append([0, 0])
            for micro in range(accumulation):
                with zerolite.no_sync(model, enabled=no_sync and micro + 1 < accumulation):
                    loss_of(model, part(joint_batch("llama", step), rank(), world())).backward()
            optimizer.step()
            optimizer.zero_grad()
            list(model.parameters())
    finally:
        Cpu.copy = copy
    return moved, sum(bucket.layout.numel for bucket in buckets), sum(p.numel() for p in llama(hidden=64).parameters())


@pytest.mark.parametrize("number", [1, 2, 4])
def test_two_bytes_down_and_two_up_whatever_the_number_of_ranks(ranks, number):
    """A parameter and step, over all ranks together; and whatever the number of micro-batches that are not reduced."""
    for stage, accumulation in [(1, 1), (2, 3), (3, 1)] if number < 4 else [(2, 1), (3, 1)]:
        results = ranks(number).run(crossings, stage, Offload(), accumulation, True)
        padded, numel = results[0][1:]
        assert numel <= padded < 1.05 * numel
        for step in range(3):
            down, up = (sum(moved[step][way] for moved, *_ in results) for way in (0, 1))
            assert (down, up) == (2 * padded, 2 * padded)


def test_each_reduced_backward_goes_down_and_streamed_parameters_come_up_twice(ranks):
    """What costs more says so: gradients a backward, and with parameters=True a copy for forward and for backward."""
    for stage, offload, factors in [(1, Offload(), (3, 1)), (3, Offload(parameters=True), (3, 6))]:
        results = ranks(2).run(crossings, stage, offload, 3, False)
        padded = results[0][1]
        for step in (1, 2):
            down, up = (sum(moved[step][way] for moved, *_ in results) for way in (0, 1))
            assert down == factors[0] * 2 * padded and up <= factors[1] * 2 * padded
            assert up > 0.5 * factors[1] * 2 * padded
