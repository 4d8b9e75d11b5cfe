"""Offload changes no number: not the workers, the threads, the buckets, the stage, nor when parameters come back.

On the CPU the same kernels step with offload and without, so fp32 and fp64 parameters are the same bits either way.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace

import pytest
import torch
from case_runs import plain_case, train_case
from cases import CASES
from models import assert_close, assert_same_bits, build, whole
from trial import HALF, Result, Trial, reference, train_each
from zerolite_kernels import cpu

from zerolite import Offload
from zerolite.offload.host import _open_direct

pytestmark = pytest.mark.skipif(cpu.path() is None, reason="the host kernels were not built")

TINY, SMALL = 1, 300  # elements: a bucket a parameter; a few parameters a bucket


@pytest.fixture
def drive(tmp_path):
    """A folder that takes direct I/O."""
    try:
        os.close(_open_direct(tmp_path))
    except ValueError as error:
        pytest.skip(str(error))
    return str(tmp_path)


def moved(result: Result, trial: Trial) -> bool:
    start = whole(build(trial.model, trial.dtype))
    return any(not torch.equal(value, start[name]) for name, value in result.parameters.items())


def check(ranks, trial: Trial, variations: list[tuple[int, dict]], world: int = 2, **options) -> list[Result]:
    """Every (stage, fields of the trial) gives the bits of the trial at stage 1; the results, of rank 0."""
    trials = [(trial, 1), *((replace(trial, **fields), stage) for stage, fields in variations)]
    of_ranks = ranks(world, **options).run(train_each, trials)
    expected = of_ranks[0][0]
    assert moved(expected, trial)
    if trial.max_grad_norm is not None:
        assert sum(norm > trial.max_grad_norm for norm in expected.norms) > trial.steps // 2, "clipping must bite"
    different = []
    for rank, results in enumerate(of_ranks):
        for (stage, fields), result in zip([(1, {}), *variations], results, strict=True):
            try:
                assert_same_bits(result.parameters, expected.parameters)
                # Other buckets have other terms of the norm.
                tolerance = 1e-14 if "bucket_numel" in fields else 0
                assert result.norms == pytest.approx(expected.norms, rel=tolerance, abs=0)
            except AssertionError as error:
                different.append(f"rank {rank}, stage {stage}, {fields}: {error}")
    assert not different, "\n".join(different)
    return of_ranks[0]


def of_stages(*stages: int, **offload) -> list[tuple[int, dict]]:
    return [(stage, {"offload": Offload(**offload)}) for stage in stages]


# fp32


def layouts(drive: str) -> list[tuple[int, dict]]:
    """Every value of every switch, not every combination."""
    return [
        (0, {"offload": Offload(workers=1, threads=1)}),
        (0, {"offload": Offload(workers=3, threads=1), "bucket_numel": SMALL, "read": True}),
        (1, {"offload": Offload(workers=2, threads=2), "bucket_numel": TINY}),
        (1, {"offload": Offload(threads=2), "read": True}),
        (2, {"offload": Offload(workers=3, threads=2)}),
        (2, {"offload": Offload(path=drive, workers=2, threads=1), "bucket_numel": SMALL}),
        (3, {"offload": Offload(workers=2, threads=1), "read": True}),
        (3, {"offload": Offload(threads=2), "bucket_numel": SMALL}),
        (3, {"offload": Offload(parameters=True, workers=1, threads=2), "bucket_numel": TINY}),
        (3, {"offload": Offload(parameters=True, path=drive), "read": True}),
    ]


@pytest.mark.parametrize("world", [1, 2])
def test_workers_threads_buckets_and_stages(ranks, drive, world):
    trial = Trial(
        "llama-wide", torch.float32, steps=3, accumulation=2, no_sync=False, max_grad_norm=0.5, two_groups=True
    )
    check(ranks, trial, layouts(drive), world)


RUNS = {
    "plain": {"schedule": True, "two_groups": True},
    "clipped": {"accumulation": 4, "no_sync": True, "max_grad_norm": 0.5},
    "summed": {"accumulation": 4, "no_sync": False, "schedule": True},
    "reentrant": {"checkpointing": "reentrant", "max_grad_norm": 0.5},
    "non-reentrant": {"checkpointing": "non-reentrant"},
    "frozen": {"frozen": "layers.0", "max_grad_norm": 0.5},
    "Adam": {"optimizer": "Adam", "two_groups": True},
    "Lion": {"optimizer": "Lion", "lr": 1e-3, "max_grad_norm": 0.5, "accumulation": 2, "no_sync": False},
    "Lamb": {"optimizer": "Lamb", "two_groups": True, "max_grad_norm": 0.5, "accumulation": 2},
    "reduced in bf16": {"reduce": torch.bfloat16},
}


@pytest.mark.parametrize("name", RUNS)
def test_ways_to_train(ranks, name):
    """Clipping, accumulation, groups, schedules, activation checkpointing, frozen parameters and every rule."""
    variations = [
        (2, {"offload": Offload(workers=2, threads=1), "bucket_numel": SMALL}),
        (3, {"offload": Offload()}),
        (3, {"offload": Offload(parameters=True, threads=2)}),
    ]
    check(ranks, Trial("llama", torch.float32, **{"steps": 3, **RUNS[name]}), variations)


@pytest.mark.parametrize("model", ["llama-tied", "gpt2", "t5", "mixtral"])
def test_families(ranks, model):
    trial = Trial(model, torch.float32, steps=3, max_grad_norm=0.5)
    check(ranks, trial, [*of_stages(1, 3, workers=2), *of_stages(3, parameters=True)])


def test_meshes(ranks, drive):
    """Three ranks, and replicas of shards."""
    trial = Trial("llama", torch.float32, steps=2, accumulation=2, no_sync=False, max_grad_norm=0.5)
    variations = [*of_stages(2, 3, threads=1), *of_stages(3, parameters=True, path=drive)]
    check(ranks, trial, variations, 3)
    check(ranks, replace(trial, mesh=(2, 2)), variations, 4)


def test_one_process_without_torch_distributed(ranks):
    trial = Trial("llama", torch.float32, steps=3, accumulation=2, no_sync=False, max_grad_norm=0.5)
    check(ranks, trial, [*of_stages(0, 3, workers=2), *of_stages(3, parameters=True)], 1, distributed=False)


def test_a_budget_keeps_some_units_on_the_device(ranks):
    trial = Trial("llama", torch.float32, steps=3, accumulation=2, no_sync=False, max_grad_norm=0.5, two_groups=True)
    variations = [
        *of_stages(0, 1, 2, 3, budget=HALF),
        *of_stages(2, budget="60KB"),
        *of_stages(2, budget="80KB"),
        *of_stages(1, budget="1GB"),
    ]
    _, *shares, fits = [result.buckets for result in check(ranks, trial, variations)]
    assert all(0 < on_host < total for on_host, total in shares) and len(set(shares)) > 1, shares
    assert fits[0] == 0  # and there are no workers


# other dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_16_bits(ranks, drive, dtype):
    """Alike for every layout; a step without offload, which rounds ties to even in bf16, differs by a rounding."""
    run = {"steps": 6, "accumulation": 2, "no_sync": False, "max_grad_norm": 0.5, "reduce": torch.float32}
    trial = Trial("llama", dtype, **run, offload=Offload())
    on_device, *_ = check(
        ranks,
        trial,
        [
            (0, {"offload": Offload(workers=3, threads=1)}),
            (2, {"offload": Offload(path=drive, threads=2), "read": True}),
            (3, {"offload": Offload(workers=2)}),
            (3, {"offload": Offload(parameters=True)}),
        ],
    )
    without = replace(trial, offload=None)
    one_step = [(replace(each, steps=1), 1) for each in (trial, without)]
    (plain, offloaded_once, plain_once), _ = ranks(2).run(train_each, [(without, 1), *one_step])
    skipped = [not math.isfinite(norm) for norm in plain.norms]
    assert any(skipped) == (dtype == torch.float16) and not all(skipped)
    assert [not math.isfinite(norm) for norm in on_device.norms] == skipped
    if dtype == torch.float16:  # rounded alike
        assert_same_bits(on_device.parameters, plain.parameters)
    else:  # one rounding in the first step has others in all later ones
        assert on_device.norms == pytest.approx(plain.norms, rel=0.02)
    same = total = 0
    for name, value in plain_once.parameters.items():
        mine = offloaded_once.parameters[name]
        assert mine.dtype == value.dtype == dtype
        unit = torch.finfo(dtype).eps * value.float().abs()
        assert ((mine.float() - value.float()).abs() <= 1.01 * unit).all(), name
        same, total = same + (mine == value).sum().item(), total + value.numel()
    assert same / total > 0.99


@pytest.mark.parametrize("states", ["bf16", "int8"])
@pytest.mark.parametrize("optimizer", ["AdamW", "Lamb", "Lion"])
def test_narrow_states(ranks, drive, states, optimizer):
    """Stochastic rounding draws by place and step: every layout gives one result, and another one than fp32 states."""
    trial = Trial("llama-wide", torch.bfloat16, steps=4, max_grad_norm=0.5, optimizer=optimizer, lr=1e-3)
    trial = replace(trial, offload=Offload(states=states))
    results = check(
        ranks,
        trial,
        [
            (0, {"offload": Offload(states=states, workers=3, threads=1)}),
            (2, {"offload": Offload(states=states, path=drive, workers=2)}),
            (3, {"offload": Offload(states=states, threads=2)}),
            (3, {"offload": Offload(states=states, parameters=True)}),
        ],
    )
    wide = check(ranks, replace(trial, offload=Offload()), [])
    assert any(not torch.equal(wide[0].parameters[name], value) for name, value in results[0].parameters.items())


# fp64 against plain torch


@pytest.mark.parametrize("model", ["llama-tied", "t5"])
def test_fp64_equals_plain_torch(ranks, drive, model):
    trial = Trial(model, accumulation=2, max_grad_norm=0.25, two_groups=True, schedule=True)
    expected = reference(trial, 2)
    assert min(expected.norms) > 0.25, "clipping must bite"
    variations = [*of_stages(0, 1, workers=2), *of_stages(2, path=drive), *of_stages(3, parameters=True, threads=2)]
    for result in check(ranks, trial, variations):
        assert_close(result.parameters, expected.parameters)
        assert result.norms == pytest.approx(expected.norms, rel=1e-9)


def cases_on_rank(cases: list[tuple[str, int]], offload: Offload):
    """What the first case that raises does is what the test is told."""
    results = []
    for name, stage in cases:
        try:
            results.append(train_case(name, stage, offload))
        except Exception as error:
            raise RuntimeError(f"{name} at stage {stage}: {error}") from error
    return results


def stages_of(name: str) -> range:
    return range(4 if CASES[name].same_units_on_every_rank else 3)


def check_cases(ranks, cases: list[tuple[str, int]], offload: Offload) -> None:
    different = []
    for results in ranks(2, timeout=60.0 + len(cases)).run(cases_on_rank, cases, offload):
        for (name, stage), (parameters, norms) in zip(cases, results, strict=True):
            expected, expected_norms = plain_case(name, 2)
            try:
                assert_close(parameters, expected)
                assert norms == pytest.approx(expected_norms, rel=1e-9)
            except AssertionError as error:
                different.append(f"{name} at stage {stage}: {error}")
    assert not different, "\n".join(different)


@pytest.mark.parametrize("turn", range(4))
def test_odd_uses_of_autograd_equal_plain_torch(ranks, turn):
    """The cases of cases.py, each at one stage."""
    chosen = list(enumerate(CASES))[turn::4]
    cases = [(name, stages_of(name)[(index // 4 + 1) % len(stages_of(name))]) for index, name in chosen]
    check_cases(ranks, cases, Offload(workers=1 + turn % 2))


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_all_odd_uses_of_autograd_at_every_stage(ranks, stage):
    cases = [(name, stage) for name in CASES if stage in stages_of(name)]
    check_cases(ranks, cases, Offload())
    if stage == 3:
        check_cases(ranks, cases, Offload(parameters=True))
