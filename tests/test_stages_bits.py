"""In fp32 on two ranks the stage changes no bit in 20 steps with clipping and accumulation."""

from __future__ import annotations

import pytest
import torch
from models import assert_same_bits, build, whole
from trial import Trial, train


@pytest.mark.parametrize("no_sync", [True, False], ids=["no_sync", "every-backward-syncs"])
@pytest.mark.parametrize("model", ["llama", "llama-tied", "gpt2", "t5", "mixtral"])
def test_every_stage_gives_the_same_bits(ranks, model, no_sync):
    trial = Trial(
        model, torch.float32, steps=20, accumulation=2, no_sync=no_sync, max_grad_norm=0.5, two_groups=model != "gpt2"
    )
    check_stages(ranks, trial)


@pytest.mark.parametrize("checkpointing", ["reentrant", "non-reentrant"])
def test_every_stage_gives_the_same_bits_under_activation_checkpointing(ranks, checkpointing):
    check_stages(ranks, Trial("llama", torch.float32, steps=6, max_grad_norm=0.5, checkpointing=checkpointing))


def test_every_stage_gives_the_same_bits_in_bf16(ranks):
    check_stages(ranks, Trial("llama", torch.bfloat16, steps=6, accumulation=2, max_grad_norm=0.5))


def check_stages(ranks, trial: Trial) -> None:
    first, second = ranks(2).run(train, trial, 0)
    assert_same_bits(second.parameters, first.parameters)
    assert sum(norm > trial.max_grad_norm for norm in first.norms) > trial.steps // 2, "clipping must bite"
    start = whole(build(trial.model, trial.dtype))
    assert any(not torch.equal(value, start[name]) for name, value in first.parameters.items())
    for stage in (1, 2, 3):
        for result in ranks(2).run(train, trial, stage):
            assert_same_bits(result.parameters, first.parameters)
            assert result.norms == first.norms
