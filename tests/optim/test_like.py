"""Is `zerolite.like` torch's optimizer on the same param groups, or an error that says why not?"""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from models import Stack, assert_close, drawn, joint_batch, loss_of, part, whole
from torch.optim.lr_scheduler import OneCycleLR

import zerolite


def groups_of(model) -> list[dict]:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    return [{"params": matrices, "weight_decay": 0.2}, {"params": others, "lr": 3e-2}]


def trained(kind: str, stage: int | None) -> tuple[dict[str, torch.Tensor], list[str]]:
    """By torch, or by ours on the groups of torch's; the scheduler is built on torch's before the model is sharded."""
    model = drawn(Stack).double()
    optimizer = getattr(torch.optim, kind)(groups_of(model)[:1], lr=1e-2)
    scheduler = OneCycleLR(optimizer, max_lr=0.1, total_steps=8)
    torch_optimizer = optimizer
    if stage is not None:
        zerolite.shard(model, stage=stage)
        optimizer = zerolite.like(optimizer)
        assert all(
            ours is theirs for ours, theirs in zip(optimizer.param_groups, torch_optimizer.param_groups, strict=True)
        )
    added = {**scheduler.optimizer.param_groups[0], **groups_of(model)[1]}
    torch_optimizer.add_param_group(added)
    scheduler.base_lrs = scheduler.base_lrs * 2
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(4):
            loss_of(model, part(joint_batch("stack", step), 0, 1)).backward()
            optimizer.step()
            torch_optimizer.zero_grad()
            scheduler.step()
    with zerolite.full_params(model) if stage is not None else warnings.catch_warnings():
        return whole(model), [str(warning.message) for warning in said]


def both(kind: str):
    return [trained(kind, stage) for stage in (None, 1, 3)]


@pytest.mark.parametrize("kind", ["AdamW", "Adam"])
def test_schedulers_and_groups_of_the_torch_optimizer_steer_ours(ranks, kind):
    ((expected, _), *runs) = ranks(1).run(both, kind)[0]
    for parameters, said in runs:
        assert_close(parameters, expected, rtol=1e-12, atol=1e-13)
        assert not said


def refusals() -> list[str]:
    model = drawn(Stack)
    stepped = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 5)).sum().backward()
    stepped.step()
    unsharded = torch.optim.AdamW(drawn(Stack).parameters())
    model.zero_grad()
    zerolite.shard(model, stage=2)
    hooked = torch.optim.Adam(model.parameters())
    hooked.register_step_pre_hook(lambda *args: None)
    given = [torch.optim.Adam(model.parameters(), **{option: True}) for option in ("amsgrad", "maximize")]
    said = []
    for optimizer in (stepped, unsharded, hooked, torch.optim.SGD(model.parameters(), lr=0.1), *given):
        try:
            zerolite.like(optimizer)
        except (TypeError, ValueError) as error:
            said.append(f"{type(error).__name__}: {error}")
    model(torch.ones(2, 5)).sum().backward()
    before = whole(model)
    try:
        torch.optim.AdamW(model.parameters(), lr=1.0).step()
    except zerolite.ZeroliteError as error:
        said.append(f"{type(error).__name__}: {error}")
    assert all(torch.equal(value, before[name]) for name, value in whole(model).items())
    return said


def test_what_ours_is_not_is_refused_by_name(ranks):
    (said,) = ranks(1).run(refusals)
    expected = [
        "ValueError.*has stepped", "ValueError.*belongs to no sharded model", "ValueError.*step hooks",
        "TypeError.*torch.optim.AdamW or torch.optim.Adam, got torch.optim.sgd.SGD", "ValueError.*amsgrad=True",
        "ValueError.*maximize=True", "ZeroliteError: torch's AdamW cannot step first.weight.*zerolite.like",
    ]  # fmt: skip
    assert len(said) == len(expected)
    for text, pattern in zip(said, expected, strict=True):
        assert re.search(pattern, text), (pattern, text)
