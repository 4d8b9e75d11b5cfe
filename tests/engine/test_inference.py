"""Evaluation, generation and surgery on a sharded model: any length on any rank, and training goes on unharmed."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from models import Stack, assert_close, assert_same_bits, build, drawn, joint_batch, llama, loss_of, part, whole

STAGES = (0, 1, 2, 3)


def sharded(name: str, stage: int, dtype: torch.dtype = torch.float64):
    import zerolite

    precision = zerolite.Precision(dtype, dtype)
    model = zerolite.shard(build(name, dtype), stage=stage, precision=precision)
    return model, zerolite.AdamW(model.parameters(), lr=1e-2)


def train_step(name: str, model, optimizer, step: int) -> None:
    loss_of(model, part(joint_batch(name, step), dist.get_rank(), dist.get_world_size())).backward()
    optimizer.step()
    optimizer.zero_grad()


def prompt(rank: int) -> torch.Tensor:
    """One row more and two tokens more on each rank."""
    generator = torch.Generator().manual_seed(7 + rank)
    return torch.randint(3, 64, (1 + rank, 3 + 2 * rank), generator=generator)


def answer(model, name: str, rank: int, new: int | None = None) -> torch.Tensor:
    inputs = prompt(rank)
    return model.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=new or 4 + 3 * rank,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )


def generate(name: str, stage: int, whole_model: bool):
    import zerolite

    model, optimizer = sharded(name, stage)
    train_step(name, model, optimizer, 0)
    model.eval()
    with zerolite.full_params(model) if whole_model else nullcontext():
        tokens = answer(model, name, dist.get_rank())
    model.train()
    train_step(name, model, optimizer, 1)
    with zerolite.full_params(model):
        return tokens, whole(model)


@pytest.mark.parametrize("whole_model", [False, True], ids=["plain-call", "full_params"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_generate_with_another_length_on_each_rank(ranks, name, stage, whole_model):
    model = build(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    expected = []
    for step in range(2):
        loss_of(model, joint_batch(name, step)).backward()
        for parameter in model.parameters():
            parameter.grad /= 2
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            expected = [answer(model.eval(), name, rank) for rank in range(2)]
            model.train()
    for rank, (tokens, parameters) in enumerate(ranks(2).run(generate, name, stage, whole_model)):
        assert torch.equal(tokens, expected[rank])
        assert_close(parameters, whole(model))


def evaluate(name: str, stage: int, inference: bool):
    model, optimizer = sharded(name, stage)
    model.eval()
    with torch.inference_mode() if inference else torch.no_grad():
        logits = [model(input_ids=prompt(dist.get_rank() + turn), use_cache=False).logits.clone() for turn in range(2)]
    model.train()
    train_step(name, model, optimizer, 0)  # tensors of inference mode must not be left behind
    return logits


@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("stage", STAGES)
def test_evaluation_with_another_length_on_each_rank(ranks, stage, inference):
    model = build("llama").eval()
    for rank, logits in enumerate(ranks(2).run(evaluate, "llama", stage, inference)):
        for turn, value in enumerate(logits):
            torch.testing.assert_close(value, model(input_ids=prompt(rank + turn)).logits, rtol=1e-12, atol=1e-12)


def one_rank_alone(stage: int):
    import zerolite

    model, _ = sharded("llama", stage)
    with zerolite.full_params(model):
        if dist.get_rank() == 0:
            with torch.no_grad():
                return [model(input_ids=prompt(turn)).logits.clone() for turn in range(3)]


@pytest.mark.parametrize("stage", STAGES)
def test_one_rank_may_evaluate_alone_inside_full_params(ranks, stage):
    model = build("llama")
    logits, nothing = ranks(2).run(one_rank_alone, stage)
    assert nothing is None
    for turn, value in enumerate(logits):
        torch.testing.assert_close(value, model(input_ids=prompt(turn)).logits, rtol=1e-12, atol=1e-12)


def look(stage: int):
    import zerolite

    model, optimizer = sharded("llama-tied", stage)
    with zerolite.full_params(model):
        inside = whole(model)
        tied = model.lm_head.weight is model.model.embed_tokens.weight
    outside = whole(model)
    train_step("llama-tied", model, optimizer, 0)
    return inside, tied, outside, whole(model)


@pytest.mark.parametrize("stage", STAGES)
def test_parameters_are_whole_inside_and_never_silently_stale_outside(ranks, stage):
    start = whole(build("llama-tied"))
    for inside, tied, outside, after in ranks(2).run(look, stage):
        assert tied
        assert_same_bits(inside, start)
        assert {name: value.shape for name, value in outside.items()} == {
            name: value.shape for name, value in start.items()
        }
        for values in (outside, after):
            for name, value in values.items():
                assert value.isnan().all() if stage == 3 else value.isfinite().all(), name


def edit(stage: int, dtype: torch.dtype, writeback: bool):
    import zerolite

    precision = zerolite.Precision(dtype)
    model = zerolite.shard(drawn(Stack).to(dtype), stage=stage, precision=precision)
    optimizer = zerolite.AdamW(model.parameters(), lr=0.0)
    with zerolite.full_params(model, writeback=writeback), torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    model(torch.ones(2, 5, dtype=dtype)).sum().backward()
    optimizer.step()  # with a learning rate of 0: what the master holds
    with zerolite.full_params(model):
        return whole(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stage", STAGES)
def test_writeback_keeps_edits_in_the_master_too(ranks, stage, dtype):
    expected = {name: 2.0 * value for name, value in whole(drawn(Stack).to(dtype)).items()}
    for result in ranks(2).run(edit, stage, dtype, True):
        assert_same_bits(result, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_writeback_stage_3_drops_edits(ranks, dtype):
    for result in ranks(2).run(edit, 3, dtype, False):
        assert_same_bits(result, whole(drawn(Stack).to(dtype)))


def nested(stage: int):
    import zerolite

    model, _ = sharded("stack", stage)
    with zerolite.full_params(model):
        with zerolite.full_params(model):
            inner = whole(model)
        outer = whole(model)
    try:
        with zerolite.full_params(model):
            raise KeyError("mine")
    except KeyError:
        pass
    with zerolite.full_params(model):
        return inner, outer, whole(model)


@pytest.mark.parametrize("stage", STAGES)
def test_full_params_nests_and_survives_an_exception(ranks, stage):
    for results in ranks(2).run(nested, stage):
        for values in results:
            assert_same_bits(values, whole(build("stack")))


def generate_on_rank_0_alone():
    import zerolite

    model = zerolite.shard(drawn(llama), stage=3).eval()
    tokens = None
    with zerolite.full_params(model):
        if dist.get_rank() == 0:
            tokens = model.generate(torch.tensor([[1, 5]]), max_new_tokens=3, do_sample=False).tolist()
    return tokens


def test_one_rank_may_generate_while_parameters_are_whole(ranks):
    """Inside full_params generation communicates nothing: rank 0 alone gives what plain transformers gives."""
    expected = drawn(llama).eval().generate(torch.tensor([[1, 5]]), max_new_tokens=3, do_sample=False).tolist()
    assert ranks(2).run(generate_on_rank_0_alone) == [expected, None]
