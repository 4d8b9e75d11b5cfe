"""`measure` gives the bytes of 16 phi and its stages at the end of backward, exactly, with the padding stated."""

from __future__ import annotations

import pytest
import torch
from models import drawn, joint_batch, layouts_of, llama, loss_of, part
from saved import Odd, full, make, rank, train, world

from zerolite.shards.layout import ALIGNMENT_NUMEL
from zerolite.shards.units import BUCKET_NUMEL

WORLD = 2
FP32, BF16 = torch.float32, torch.bfloat16
DTYPES = [(FP32, FP32), (BF16, BF16), (BF16, FP32)]


def usage(stage: int, dtype: torch.dtype, reduce: torch.dtype, rule: str):
    import zerolite

    model = zerolite.shard(drawn(llama), stage=stage, precision=zerolite.Precision(dtype, reduce))
    bare = zerolite.measure(model)
    optimizer = getattr(zerolite, rule)(model.parameters(), lr=1e-3)
    for step in range(2):
        optimizer.zero_grad()
        rest = zerolite.measure(model, optimizer)
        loss_of(model, part(joint_batch("llama", step), rank(), world())).backward()
        end = zerolite.measure(model, optimizer)
        optimizer.step()
    after = zerolite.measure(model, optimizer)
    with zerolite.full_params(model):
        inside = zerolite.measure(model, optimizer)
    return bare, rest, end, after, inside


def elements() -> tuple[int, int]:
    """(parameters, parameters with padding) of the model on two ranks."""
    model = llama()
    layouts = layouts_of(model, WORLD, BUCKET_NUMEL)
    return sum(parameter.numel() for parameter in model.parameters()), sum(layout.numel for layout in layouts)


@pytest.mark.parametrize("rule, states", [("AdamW", 8), ("Lion", 4)])
@pytest.mark.parametrize("dtype, reduce", DTYPES, ids=["fp32", "bf16", "bf16-reduced-in-fp32"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bytes_by_kind_are_the_formula_of_the_stage(ranks, stage, dtype, reduce, rule, states):
    """Parameters, gradients and states of each rank are the formula's bytes, to the byte, plus the stated padding."""
    numel, padded = elements()
    master = 4 if dtype == BF16 else 0
    whole = [
        (dtype.itemsize, WORLD if stage == 3 else 1),
        (reduce.itemsize, WORLD if stage >= 2 else 1),
        (states + master, WORLD if stage >= 1 else 1),
    ]
    results = ranks(WORLD).run(usage, stage, dtype, reduce, rule)
    for bare, rest, end, after, inside in results:
        kinds = [end.parameters_bytes, end.gradients_bytes, end.optimizer_bytes]
        assert kinds == [size * padded // share for size, share in whole]
        assert rest == type(end)(kinds[0], 0, kinds[2], rest.padding_bytes)
        assert after == end
        assert (bare.parameters_bytes, bare.gradients_bytes) == (kinds[0], 0)
        assert bare.optimizer_bytes == master * padded // whole[2][1]
        assert inside.parameters_bytes == kinds[0] + (dtype.itemsize * padded if stage == 3 else 0)
    without_padding = sum(sum(vars(end).values()) - 2 * end.padding_bytes for _, _, end, _, _ in results)
    assert without_padding == sum(size * numel * WORLD // share for size, share in whole)


def test_stage_3_in_bf16_holds_sixteen_bytes_over_n(ranks):
    """16 phi / N: what the design promises, on both ranks together without padding, which is what alignment costs."""
    numel, padded = elements()
    ends = [end for _, _, end, _, _ in ranks(WORLD).run(usage, 3, BF16, BF16, "AdamW")]
    totals = [end.parameters_bytes + end.gradients_bytes + end.optimizer_bytes for end in ends]
    assert sum(totals) - sum(end.padding_bytes for end in ends) == 16 * numel
    assert totals[0] == totals[1] and sum(end.padding_bytes for end in ends) == 16 * (padded - numel)
    assert padded - numel < ALIGNMENT_NUMEL * (len(list(llama().parameters())) + 3 * WORLD)  # a root and two blocks


def usage_of_odd(stage: int):
    import zerolite

    model, optimizer = make(stage, FP32)
    train(model, optimizer, range(1))
    usage = zerolite.measure(model, optimizer)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    full(model)
    assert zerolite.measure(model, optimizer) == usage  # what was gathered is freed
    return usage, trainable, frozen


@pytest.mark.parametrize("stage", [0, 3])
def test_frozen_and_tied_parameters(ranks, stage):
    """A frozen parameter has bytes but no states, and a tied one counts once."""
    results = ranks(WORLD).run(usage_of_odd, stage)
    (_, trainable, frozen), owners = results[0], WORLD if stage == 0 else 1
    assert trainable + frozen == sum(parameter.numel() for parameter in Odd().parameters())
    for kind, expected in [("parameters_bytes", 4 * (trainable + frozen)), ("optimizer_bytes", 8 * trainable)]:
        counted = sum(getattr(usage, kind) for usage, _, _ in results)
        assert owners * expected <= counted
    total = sum(usage.parameters_bytes + usage.optimizer_bytes - usage.padding_bytes for usage, _, _ in results)
    assert total == owners * (4 * (trainable + frozen) + 8 * trainable)


def measure_plain():
    import zerolite

    return zerolite.measure(Odd())


def test_a_model_that_is_not_sharded_is_refused(ranks):
    """There is nothing of zerolite's to count."""
    with pytest.raises(Exception, match="ValueError.*not sharded"):
        ranks(1).run(measure_plain)
