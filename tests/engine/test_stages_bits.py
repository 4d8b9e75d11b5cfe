"""In fp32 on two ranks the stage changes no bit in several steps with clipping and accumulation."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from cases import data, squared
from models import Stack, assert_same_bits, build, drawn, whole
from trial import Trial, train_each


@pytest.mark.each
@pytest.mark.parametrize("no_sync", [True, False], ids=["no_sync", "every-backward-syncs"])
@pytest.mark.parametrize("model", ["llama", "llama-tied", "gpt2", "t5", "mixtral"])
def test_every_stage_gives_the_same_bits(ranks, model, no_sync):
    trial = Trial(
        model, torch.float32, steps=4, accumulation=2, no_sync=no_sync, max_grad_norm=0.5, two_groups=model != "gpt2"
    )
    check_stages(ranks, trial)


@pytest.mark.parametrize("checkpointing", ["reentrant", "non-reentrant"])
def test_every_stage_gives_the_same_bits_under_activation_checkpointing(ranks, checkpointing):
    check_stages(ranks, Trial("llama", torch.float32, steps=6, max_grad_norm=0.5, checkpointing=checkpointing))


def test_every_stage_gives_the_same_bits_in_bf16(ranks):
    check_stages(ranks, Trial("llama", torch.bfloat16, steps=6, accumulation=2, max_grad_norm=0.5))


def learn(width: int, blocks: int, clip: float) -> list[dict[str, torch.Tensor]]:
    """After a few steps at every stage."""
    import zerolite

    results = []
    for stage in range(4):
        model = drawn(lambda: Stack(width, blocks)).float()
        model = zerolite.shard(model, stage=stage)
        optimizer = zerolite.AdamW(model.parameters(), lr=1e-2, max_grad_norm=clip)
        for step in range(4):
            x, y = (tensor.float() for tensor in data(dist.get_rank(), step))
            squared(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        with zerolite.full_params(model):
            results.append(whole(model))
    return results


@pytest.mark.parametrize("width", [1, 2, 3, 5, 8, 13, 16, 21, 34, 55])
def test_every_stage_gives_the_same_bits_whatever_the_sizes(ranks, width):
    """Ranges begin and end anywhere in a parameter; the rule must round alike at their ends."""
    for results in ranks(2).run(learn, width, 1 + width % 4, 0.5):
        for result in results[1:]:
            assert_same_bits(result, results[0])


def check_stages(ranks, trial: Trial) -> None:
    of_ranks = ranks(2).run(train_each, [(trial, stage) for stage in range(4)])
    first = of_ranks[0][0]
    assert sum(norm > trial.max_grad_norm for norm in first.norms) > trial.steps // 2, "clipping must bite"
    start = whole(build(trial.model, trial.dtype))
    assert any(not torch.equal(value, start[name]) for name, value in first.parameters.items())
    for results in of_ranks:
        for result in results:
            assert_same_bits(result.parameters, first.parameters)
            assert result.norms == first.norms
