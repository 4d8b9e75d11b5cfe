"""Every case of cases.py ends, at every stage, where plain torch ends with the mean of the ranks' gradients."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache

import pytest
import torch
import torch.distributed as dist
from cases import CASES, Case
from models import Stack, assert_close, divide_gradients, drawn, whole
from ranks import RankError

LR, WEIGHT_DECAY = 1e-2, 0.1


def zero_grad(case: Case, model, optimizer) -> None:
    match type(case).__name__:
        case "NoZeroGrad":
            pass
        case "ZeroGradToZeros":
            optimizer.zero_grad(set_to_none=False)
        case "ZeroGradOfTheModel":
            model.zero_grad()
        case _:
            optimizer.zero_grad()


def on_rank(name: str, stage: int):
    import zerolite

    case = CASES[name]()
    model = drawn(case.build).double()
    case.prepare(model)
    model = zerolite.shard(model, stage=stage, precision=zerolite.Precision(torch.float64, torch.float64))
    optimizer = zerolite.AdamW(case.groups(model), lr=LR, weight_decay=WEIGHT_DECAY)
    norms = []
    for step in range(case.steps):
        case.step(model, dist.get_rank(), step, lambda: zerolite.no_sync(model))
        optimizer.step()
        norms.append(optimizer.grad_norm)
        zero_grad(case, model, optimizer)
    with zerolite.full_params(model):
        return whole(model), norms


@cache
def reference(name: str, world: int):
    case = CASES[name]()
    model = drawn(case.build).double()
    case.prepare(model)
    optimizer = torch.optim.AdamW(case.groups(model), lr=LR, weight_decay=WEIGHT_DECAY)
    norms, kept = [], {}
    for step in range(case.steps):
        for rank in range(world):
            case.step(model, rank, step, nullcontext)
        divide_gradients(model, world)
        for parameter, gradient in kept.items():
            parameter.grad += gradient
        given = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norms.append(torch.nn.utils.clip_grad_norm_(given, float("inf")).item())
        optimizer.step()
        if name == "NoZeroGrad":
            kept = {parameter: parameter.grad for parameter in given}
            optimizer.zero_grad()
        else:
            zero_grad(case, model, optimizer)
    return whole(model), norms


STAGE_CASES = [
    (name, stage) for name, case in CASES.items() for stage in range(4) if stage < 3 or case.same_units_on_every_rank
]


@pytest.mark.parametrize("name, stage", STAGE_CASES)
def test_equals_plain_torch(ranks, name, stage):
    parameters, norms = reference(name, 2)
    for actual, actual_norms in ranks(2).run(on_rank, name, stage):
        assert_close(actual, parameters)
        assert actual_norms == pytest.approx(norms, rel=1e-9)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "name", ["Plain", "TiedLinear", "FrozenBlock", "SkipsExperts", "ZeroSize", "Scalars", "Checkpointed"]
)
def test_equals_plain_torch_on_three_ranks(ranks, name, stage):
    """Seven wide: nothing divides by three."""
    parameters, _ = reference(name, 3)
    for actual, _ in ranks(3).run(on_rank, name, stage):
        assert_close(actual, parameters)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.same_units_on_every_rank])
def test_stage_3_refuses_ranks_that_run_different_units(ranks, name):
    """Blocks of one size: gathered by position alone, a rank would compute with another block's parameters."""
    with pytest.raises(RankError, match="modules|units") as caught:
        ranks(2).run(on_rank, name, 3)
    assert caught.value.kind == "ZeroliteError"


def used_from_outside(stage: int):
    import zerolite

    model = zerolite.shard(drawn(Stack).double(), stage=stage)
    optimizer = zerolite.AdamW(model.parameters(), lr=LR)
    with zerolite.full_params(model):
        before = whole(model)
    loss = model(torch.ones(2, 5, dtype=torch.float64)).sum() + (model.blocks[1].up.weight ** 2).sum()
    loss.backward()
    optimizer.step()
    with zerolite.full_params(model):
        return before, whole(model), bool(loss.isnan()), optimizer.step_was_skipped


@pytest.mark.parametrize("stage", [0, 3])
def test_a_parameter_used_outside_its_unit_is_seen_at_stage_3(ranks, stage):
    """It reads NaN, so nothing is trained on what it is not."""
    for before, after, is_nan, skipped in ranks(2).run(used_from_outside, stage):
        assert is_nan == skipped == (stage == 3)
        assert torch.equal(before["first.weight"], after["first.weight"]) == skipped


def test_the_cases_differ_from_the_plain_one():
    """A case that leaves no trace would prove nothing."""
    plain, _ = reference("Plain", 2)
    blocks, _ = reference("SkipsABlockOnOneRank", 2)
    never, _ = reference("BlockNeverUsed", 2)
    assert all(not torch.equal(plain[name], blocks[name]) for name in plain)
    assert not torch.equal(plain["blocks.1.up.weight"], never["blocks.1.up.weight"])
