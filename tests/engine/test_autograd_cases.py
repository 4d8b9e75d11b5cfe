"""Every case of cases.py ends, at every stage, where plain torch ends with the mean of the ranks' gradients."""

from __future__ import annotations

import pytest
import torch
from case_runs import LR, plain_case, train_case
from cases import CASES
from crosses import each
from models import Stack, assert_close, drawn, whole
from ranks import RankError

import zerolite

WHOLE = [name for name, case in CASES.items() if case.same_units_on_every_rank]
# Stage 3 has a way of its own through autograd; 0, 1 and 2 share theirs.
STAGE_CASES = [*each(list(CASES), (0, 1, 2)), *((name, 3) for name in WHOLE)]


@pytest.mark.parametrize("name, stage", STAGE_CASES)
def test_equals_plain_torch(ranks, name, stage):
    parameters, norms = plain_case(name, 2)
    for actual, actual_norms in ranks(2).run(train_case, name, stage):
        assert_close(actual, parameters)
        assert actual_norms == pytest.approx(norms, rel=1e-9)


THREE_RANKS = ["Plain", "TiedLinear", "FrozenBlock", "SkipsExperts", "ZeroSize", "Scalars", "Checkpointed"]


@pytest.mark.parametrize("name, stage", [*each(THREE_RANKS, (2, 0, 1)), *((name, 3) for name in THREE_RANKS)])
def test_equals_plain_torch_on_three_ranks(ranks, name, stage):
    """Seven wide: nothing divides by three."""
    parameters, _ = plain_case(name, 3)
    for actual, _ in ranks(3).run(train_case, name, stage):
        assert_close(actual, parameters)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.same_units_on_every_rank])
def test_stage_3_refuses_ranks_that_run_different_units(ranks, name):
    """Blocks of one size: gathered by position alone, a rank would compute with another block's parameters."""
    with pytest.raises(RankError, match="modules|units") as caught:
        ranks(2).run(train_case, name, 3)
    assert caught.value.kind == "ZeroliteError"


def used_from_outside(stage: int):
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
    plain, _ = plain_case("Plain", 2)
    blocks, _ = plain_case("SkipsABlockOnOneRank", 2)
    never, _ = plain_case("BlockNeverUsed", 2)
    assert all(not torch.equal(plain[name], blocks[name]) for name in plain)
    assert not torch.equal(plain["blocks.1.up.weight"], never["blocks.1.up.weight"])
