"""Every odd use of autograd in cases.py ends, at every stage, where plain torch ends with the mean of the ranks' gradients."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache

import pytest
import torch
import torch.distributed as dist
from cases import CASES, Case
from models import assert_close, divide_gradients, drawn, whole

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


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", CASES)
def test_equals_plain_torch(ranks, name, stage):
    parameters, norms = reference(name, 2)
    for actual, actual_norms in ranks(2).run(on_rank, name, stage):
        assert_close(actual, parameters)
        assert actual_norms == pytest.approx(norms, rel=1e-9)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["Plain", "TiedLinear", "FrozenBlock", "SkipsABlockInForward", "ZeroSize", "Scalars", "Checkpointed"])
def test_equals_plain_torch_on_three_ranks(ranks, name, stage):
    """Seven wide: nothing divides by three."""
    parameters, _ = reference(name, 3)
    for actual, _ in ranks(3).run(on_rank, name, stage):
        assert_close(actual, parameters)


def test_the_cases_differ_from_the_plain_one():
    """A case that leaves no trace would prove nothing."""
    plain, _ = reference("Plain", 2)
    blocks, _ = reference("SkipsABlockOnOneRank", 2)
    never, _ = reference("BlockNeverUsed", 2)
    assert all(not torch.equal(plain[name], blocks[name]) for name in plain)
    assert not torch.equal(plain["blocks.1.up.weight"], never["blocks.1.up.weight"])
