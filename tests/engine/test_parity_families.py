"""In fp64, at every stage, 1 to 4 ranks end where one process with torch.optim.AdamW and the joint batch ends."""

from __future__ import annotations

import pytest
from models import assert_close
from trial import Result, Trial, reference, train

STAGES = (0, 1, 2, 3)
WORLDS = (1, 2, 3, 4)


def assert_equal(results: list[Result], expected: Result) -> None:
    """Parameters and norms of every rank."""
    for result in results:
        assert_close(result.parameters, expected.parameters)
        assert result.norms == pytest.approx(expected.norms, rel=1e-9)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("model", ["llama", "llama-tied", "gpt2", "t5", "mixtral", "qwen-moe"])
def test_parameters_equal_plain_torch(ranks, model, world, stage):
    trial = Trial(model, max_grad_norm=0.25)
    expected = reference(trial, world)
    assert min(expected.norms) > 0.25, "clipping must bite"
    assert_equal(ranks(world).run(train, trial, stage), expected)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("no_sync", [True, False])
@pytest.mark.parametrize("model", ["llama-tied", "t5"])
def test_accumulation_groups_and_schedule_equal_plain_torch(ranks, model, no_sync, stage):
    trial = Trial(model, accumulation=3, no_sync=no_sync, max_grad_norm=0.25, two_groups=True, schedule=True)
    assert_equal(ranks(3).run(train, trial, stage), reference(trial, 3))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("checkpointing", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("model", ["llama", "gpt2", "t5"])
def test_activation_checkpointing_equals_plain_torch(ranks, model, checkpointing, stage):
    trial = Trial(model, steps=2, checkpointing=checkpointing)
    assert_equal(ranks(2).run(train, trial, stage), reference(trial, 2))


def test_one_process_without_torch_distributed_equals_plain_torch(ranks):
    trial = Trial("llama", accumulation=2, max_grad_norm=0.25)
    for stage in STAGES:
        assert_equal(ranks(1, distributed=False).run(train, trial, stage), reference(trial, 1))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("mesh", [(2, 2), (2, 1), (1, 2), (4,)], ids=str)
def test_replicas_of_shards_equal_plain_torch(ranks, mesh, stage):
    """HSDP: `replicate` x `shard`."""
    world = 1
    for size in mesh:
        world *= size
    trial = Trial("llama-tied", accumulation=2, max_grad_norm=0.25, mesh=mesh)
    assert_equal(ranks(world).run(train, trial, stage), reference(trial, world))
