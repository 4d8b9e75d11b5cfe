"""A plan's figures at sizes that no test machine has: the papers' tables, DeepSpeed's estimator, thousands of ranks."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import zerolite
from zerolite.memory.presets import PRESETS, build

BF16 = zerolite.Precision(torch.bfloat16, torch.bfloat16)
GB, GIB = 1e9, 2**30


def blocks(number: int, rows: int, columns: int) -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(columns, rows, bias=False) for _ in range(number)))


def states_bytes(model, stage: int, ranks, precision=BF16, **options) -> int:
    return zerolite.plan(model, stage, ranks, precision=precision, batch=None, **options).states_bytes


def test_the_table_of_the_zero_paper():
    """Figure 1 of Rajbhandari et al. 2020: 7.5 B parameters on 64 ranks take 120, 31.4, 16.6 and 1.9 GB."""
    model = blocks(60, 10_000, 12_500)
    figures = [states_bytes(model, stage, 64) / GB for stage in range(4)]
    assert [f"{figures[0]:.0f}", *(f"{figure:.1f}" for figure in figures[1:])] == ["120", "31.4", "16.6", "1.9"]


def test_the_estimator_of_deepspeed():
    """Its example, t5-3b on 8 ranks, from its formulas; ours beside them, and the difference explained.

    Stage 2: it counts a whole 16-bit gradient, 2 P, which lives here a bucket at a time. Stage 3: it adds the largest
    layer, 4 L, which a plan counts among what is in flight.
    """
    sizes = {"d_model": 1024, "d_kv": 128, "d_ff": 16384, "num_layers": 24, "num_heads": 32, "vocab_size": 32128}
    with torch.device("meta"):
        model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    P = sum(parameter.numel() for parameter in model.parameters())
    L = model.shared.weight.numel()
    theirs = {"2": 4 * P + 16 * P / 8, "2 cpu": 2 * P, "3": 4 * L + 18 * P / 8}
    assert {name: f"{size / GIB:.2f}" for name, size in theirs.items()} == {"2": "15.93", "2 cpu": "5.31", "3": "6.10"}
    assert f"{P * 4 * 8 * 1.5 / GIB:.2f}" == "127.48"  # host memory of stage 2 with offload
    mixed = zerolite.Precision()
    ours = {"2": states_bytes(model, 2, 8, mixed), "3": states_bytes(model, 3, 8, mixed)}
    assert ours["2"] == pytest.approx(theirs["2"] - 2 * P, rel=1e-3)
    assert ours["3"] == pytest.approx(theirs["3"] - 4 * L, rel=1e-3)
    plan = zerolite.plan(model, 2, 8, "cpu", mixed, batch=None)
    assert plan.states_bytes == pytest.approx(theirs["2 cpu"], rel=1e-3)
    assert 8 * plan.arena_bytes == pytest.approx(16 * P, rel=1e-2)  # bf16 and fp32 halves, fp32 gradient and moments


@pytest.mark.parametrize("num_ranks", [2, 8, 512])
def test_what_is_sent_is_the_papers_volume(num_ranks):
    """2 phi at stages 0 to 2 and 3 phi at stage 3, times (N - 1) / N; the last unit is gathered once, not twice."""
    model = blocks(40, 1024, 1024 * 8)
    phi = sum(parameter.numel() for parameter in model.parameters())
    share = (num_ranks - 1) / num_ranks
    for stage in range(4):
        traffic = zerolite.plan(model, stage, num_ranks, precision=BF16, batch=None).traffic
        volume = (3 - 1 / 40 if stage == 3 else 2) * phi
        assert traffic.sent_bytes == pytest.approx(2 * volume * share, rel=1e-9), stage


def test_bytes_over_the_bus_do_not_grow_with_ranks():
    """Of all ranks together: the gradients down in their dtype, the parameters up."""
    model = blocks(4, 1024, 1024 * 8)
    phi = sum(parameter.numel() for parameter in model.parameters())
    for num_ranks in (1, 4, 64):
        traffic = zerolite.plan(model, 2, num_ranks, "cpu", BF16, batch=None).traffic
        assert num_ranks * traffic.to_host_bytes == num_ranks * traffic.to_device_bytes == 2 * phi


def test_thousands_of_ranks():
    """405 B parameters at 512 to 4,096 ranks: bytes a rank fall as 1 / N, messages and their order stay."""
    model = build("llama-3-405b")
    phi = sum(parameter.numel() for parameter in model.parameters())
    plans = [zerolite.plan(model, 3, ranks, precision=BF16, batch=None) for ranks in (512, 4096)]
    for plan in plans:
        assert plan.states_bytes == pytest.approx(16 * phi / plan.world_size, rel=0.01)
    assert plans[0].traffic.num_collectives == plans[1].traffic.num_collectives
    replicated = zerolite.plan(model, 3, (8, 512), precision=BF16, batch=None)
    assert replicated.states_bytes == plans[0].states_bytes
    assert replicated.traffic.replica_bytes == pytest.approx(2 * 2 * phi / 512 * 7 / 8, rel=0.01)


@pytest.mark.parametrize("name, billions", [("smollm2-135m", 0.1345), ("llama-7b", 6.738), ("llama-13b", 13.02)])
def test_presets_have_the_published_sizes(name, billions):
    assert sum(p.numel() for p in build(name).parameters()) / 1e9 == pytest.approx(billions, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, billions", [("llama-70b", 68.98), ("llama-3-8b", 8.030), ("qwen-7b", 7.616), ("llama-3-405b", 405.9)]
)
def test_large_presets_have_the_published_sizes(name, billions):
    assert sum(p.numel() for p in build(name).parameters()) / 1e9 == pytest.approx(billions, rel=1e-3)
    assert name in PRESETS


def test_whoever_plans_is_told_what_cannot_be(tmp_path):
    """Names, models and arguments that no run could have are refused before anything is built."""
    model = blocks(2, 8, 8)
    with pytest.raises(ValueError, match="no preset .*llama-7b.* and no folder"):
        zerolite.plan("llama-8b", 0)
    with pytest.raises(ValueError, match="step=function"):
        zerolite.plan(model, 0)
    with pytest.raises(ValueError, match="batch= is a number of rows"):
        zerolite.plan(model, 0, batch=0)
    with pytest.raises(ValueError, match="use stage=3"):
        zerolite.plan(model, 2, 2, zerolite.Offload(parameters=True), batch=None)
    with pytest.raises(ValueError, match="optimizer= is one of"):
        zerolite.plan(model, 0, optimizer="sgd", batch=None)
    with pytest.raises(ValueError, match="the budget is"):
        zerolite.plan(model, 0, offload=zerolite.Offload(budget=1), batch=None)
    with pytest.raises(ValueError, match="reads at most 4096 tokens"):
        zerolite.plan("llama-7b", 0, length=5000)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json cannot be used"):
        zerolite.plan(tmp_path, 0)


def test_what_is_in_flight_is_little():
    """Beside model states: two gradient buckets and one that fills; at stage 3 the root and two units, too."""
    model = build("llama-7b")
    for stage in (2, 3):
        plan = zerolite.plan(model, stage, 64, precision=BF16, batch=None, device="cpu")
        largest = 2 * 32000 * 4096  # the embedding's bucket, in bytes
        peak = max(plan.peaks.values(), key=lambda peak: peak.total_bytes)
        assert peak.total_bytes - peak.bytes_of["units in flight"] < plan.states_bytes + 5 * largest + 2e8
        assert (peak.bytes_of["units in flight"] > 0) == (stage == 3)


def test_python_calls_grow_with_parameters_alone():
    """Twice the parameters, in as many units: at most twice the engine's calls a step, whatever the ranks."""
    calls = {}
    for columns in (10, 20):
        with torch.device("meta"):
            model = nn.Sequential(*(nn.ModuleList(nn.Linear(64, 64) for _ in range(columns)) for _ in range(6)))
        for ranks in (8, 4096):
            counted = 0

            def count(frame, event, argument):
                nonlocal counted
                counted += event == "call"

            sys.setprofile(count)
            try:
                zerolite.plan(model, 3, ranks, precision=BF16, batch=None)
            finally:
                sys.setprofile(None)
            calls[columns, ranks] = counted
    assert calls[20, 8] <= 2.05 * calls[10, 8]
    assert calls[20, 4096] == pytest.approx(calls[20, 8], rel=0.05)
