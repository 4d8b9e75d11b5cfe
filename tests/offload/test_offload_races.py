"""Whatever is late, copies, collectives, workers or the device's own work, the bits are those of a run without offload.

Each seed draws a way to train, what is called between the steps, and every delay (delays.py).
"""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from delays import late_device, slow_workers
from models import Stack, assert_same_bits, joint_batch, loss_of, part, whole
from trial import HALF, Trial, start
from zerolite_kernels import cpu

from zerolite import Offload

pytestmark = pytest.mark.skipif(cpu.path() is None, reason="the host kernels were not built")

DELAY_S = 0.003
STEPS = 3


def read_alone(model, optimizer, folder) -> None:
    """On rank 0, where parameters are whole, while the others go on to their next forward."""
    if model._zerolite.partition.stage < 3 and dist.get_rank() == 0:
        model.state_dict()


def write_back(model, optimizer, folder) -> None:
    import zerolite

    with zerolite.full_params(model, writeback=True):
        pass


def evaluate(model, optimizer, folder) -> None:
    """A forward of all ranks that no backward follows."""
    name = "stack" if isinstance(model, Stack) else "llama"
    with torch.no_grad():
        loss_of(model, part(joint_batch(name, 99, torch.float32), dist.get_rank(), dist.get_world_size()))


def rewind(model, optimizer, folder) -> None:
    """Back to the start, while what comes after it is on its way."""
    import zerolite

    zerolite.load(model, folder, optimizer)


# What changes nothing that offload or delays could have a part in.
BETWEEN = {
    "nothing": lambda model, optimizer, folder: None,
    "first": lambda model, optimizer, folder: next(model.parameters()),
    "parameters": lambda model, optimizer, folder: list(model.parameters()),
    "read alone": read_alone,
    "write back": write_back,
    "evaluate": evaluate,
    "reload": lambda model, optimizer, folder: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
    "rewind": rewind,
    "zeros": lambda model, optimizer, folder: optimizer.zero_grad(set_to_none=False),
}


def train(trial: Trial, stage: int, between: list[str], folder: Path):
    import zerolite

    rank, world = dist.get_rank(), dist.get_world_size()
    model, optimizer = start(trial, stage)
    norms = []
    zerolite.save(model, folder, optimizer)
    for step in range(trial.steps):
        for micro in range(trial.accumulation):
            batch = joint_batch(trial.model, step * trial.accumulation + micro, trial.dtype)
            with zerolite.no_sync(model, enabled=trial.no_sync and micro + 1 < trial.accumulation):
                loss_of(model, part(batch, rank, world)).backward()
        optimizer.step()
        norms.append(optimizer.grad_norm)
        if step % 2:
            optimizer.zero_grad()
        BETWEEN[between[step]](model, optimizer, folder)
        optimizer.zero_grad()
    with zerolite.full_params(model):
        return whole(model), norms


def train_late(seed: int, trial: Trial, stage: int, between: list[str], folder: Path):
    own = 1001 * seed + dist.get_rank()
    with slow_workers(DELAY_S, own), late_device(own, DELAY_S, reads_at_once=bool(own % 2)) as device:
        return train(trial, stage, between, folder), device.failures


def draw(seed: int) -> tuple[Trial, int, int, list[str]]:
    """(trial, stage, world, what is called after each step)."""
    lots = random.Random(seed)
    stage, world = seed % 4, 1 if seed % 5 == 4 else 2
    ways: list[dict] = [{}, {"workers": 2, "threads": 1}, {"threads": 2}, {"budget": HALF}]
    streamed = [{"parameters": True}, {"parameters": True, "workers": 2}]
    if stage == 3:
        ways = [*ways, *streamed] if world > 1 else streamed  # alone, stage 3 is stage 2 but for these
    trial = Trial(
        lots.choice(["stack", "stack", "llama"]),
        torch.float32,
        steps=STEPS,
        accumulation=lots.choice([1, 2, 3]),
        no_sync=lots.choice([True, False, False]),
        max_grad_norm=lots.choice([None, 0.5]),
        optimizer=lots.choice(["AdamW", "AdamW", "Lion", "Lamb"]),
        bucket_numel=lots.choice([None, 1, 200]),
        offload=Offload(**lots.choice(ways)),
    )
    return trial, stage, world, [lots.choice(list(BETWEEN)) for _ in range(STEPS)]


def race(ranks, seed: int, folder: Path, drawn=None) -> str | None:
    """What went wrong, if anything did."""
    trial, stage, world, between = drawn or draw(seed)
    folder = folder / str(seed)
    expected = ranks(world).run(train, replace(trial, offload=None), stage, between, folder)
    try:
        results = ranks(world).run(train_late, seed, trial, stage, between, folder)
        for ((parameters, norms), failures), (truth, true_norms) in zip(results, expected, strict=True):
            assert not failures, failures
            assert_same_bits(parameters, truth)
            assert norms == true_norms
    except Exception as error:
        return f"seed {seed}: {trial}, stage {stage}, world {world}, {between}: {error}"
    return None


@pytest.mark.parametrize("seed", range(20))
def test_delays_change_no_bit(ranks, tmp_path, seed):
    failure = race(ranks, seed, tmp_path)
    assert failure is None, failure


@pytest.mark.parametrize("seed", range(3))
def test_going_back_while_values_are_on_their_way(ranks, tmp_path, seed):
    """What a load brings is not overwritten by a copy that was under way."""
    trial = Trial("stack", torch.float32, steps=STEPS, bucket_numel=200, offload=Offload())
    failure = race(ranks, seed, tmp_path, (trial, 3, 2, ["rewind", "rewind", "rewind"]))
    assert failure is None, failure


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_delays_change_no_bit_in_a_campaign(ranks, tmp_path):
    failures = [failure for failure in (race(ranks, seed, tmp_path) for seed in range(100, 300)) if failure is not None]
    print(f"200 runs with delays by lot: {len(failures)} failures")
    assert not failures, "\n".join(failures)
