"""Does each optimizer of zerolite keep what torch.optim promises, at each stage and with offload?"""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from functools import partial
from typing import Any

import plain_optimizers
import pytest
import torch
from optimizer_contracts import CONTRACTS, OPTIONS, SCHEDULERS, Bench, net
from torch.optim import lr_scheduler
from zerolite_kernels import cpu

import zerolite

ONE_WORKER = zerolite.Offload(workers=1, threads=1)


def like(params, **options):
    plain = torch.optim.AdamW(params, **options)
    optimizer = zerolite.like(plain)
    optimizer.steered_by = plain  # schedulers are built on it
    return optimizer


PLAIN = {
    "AdamW": torch.optim.AdamW, "like": torch.optim.AdamW, "Adam": torch.optim.Adam,
    "Lion": plain_optimizers.Lion, "Lamb": plain_optimizers.Lamb,
}  # fmt: skip
OURS = {"AdamW": zerolite.AdamW, "like": like, "Adam": zerolite.Adam, "Lion": zerolite.Lion, "Lamb": zerolite.Lamb}


def seen_by_torch(rule: str, contract: str, dtype: torch.dtype):
    bench = Bench(net(dtype), PLAIN[rule])
    return CONTRACTS[contract](bench), bench.parameters()


def seen_by_ours(rule: str, stage: int, dtype: torch.dtype, offload) -> dict[str, Any]:
    """Every rank trains on the same rows. Schedulers know only param groups: all run on two of the optimizers."""
    results = {}
    for name, contract in CONTRACTS.items():
        if "scheduled" in name and not (offload is None and rule in ("AdamW", "like")) and "CyclicLR" not in name:
            continue
        model = zerolite.shard(net(dtype), stage=stage, offload=offload)
        bench = Bench(model, OURS[rule], partial(zerolite.full_params, model))
        try:
            results[name] = (contract(bench), bench.parameters())
        except Exception as error:
            raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error
    return results


def assert_equal(actual, expected, rel: float) -> None:
    match expected:
        case float():
            assert actual == pytest.approx(expected, rel=rel, abs=rel)
        case dict():
            assert actual.keys() == expected.keys()
            for key, value in expected.items():
                assert_equal(actual[key], value, rel)
        case list() | tuple():
            assert len(actual) == len(expected), (actual, expected)
            for mine, theirs in zip(actual, expected, strict=True):
                assert_equal(mine, theirs, rel)
        case torch.Tensor():
            torch.testing.assert_close(actual, expected, rtol=rel, atol=rel)
        case _:
            assert actual == expected


@pytest.mark.parametrize(
    "rule, world, stage, offload",
    [
        ("AdamW", 2, 1, None), ("AdamW", 2, 3, ONE_WORKER), ("like", 1, 3, None), ("Adam", 2, 3, None),
        ("Lion", 1, 2, ONE_WORKER), ("Lion", 2, 0, None), ("Lamb", 2, 2, None),
    ],
    ids=lambda value: "offload" if value is ONE_WORKER else str(value),
)  # fmt: skip
def test_what_torch_promises_holds(ranks, rule, world, stage, offload):
    if offload is not None and cpu.path() is None:
        pytest.skip("the host kernels were not built")
    dtype, rel = (torch.float64, 1e-9) if offload is None else (torch.float32, 2e-5)
    for results in ranks(world).run(seen_by_ours, rule, stage, dtype, offload):
        for contract, actual in results.items():
            try:
                assert_equal(actual, seen_by_torch(rule, contract, dtype), rel)
            except AssertionError as error:
                raise AssertionError(f"{contract}: {error}") from None


def test_the_table_has_every_scheduler_of_torch():
    module = vars(lr_scheduler).values()
    known = {kind.__name__ for kind in module if inspect.isclass(kind) and issubclass(kind, lr_scheduler.LRScheduler)}
    assert set(SCHEDULERS) == (known - {"LRScheduler", "_LRScheduler"}) | {"SWALR"}


def model(stage: int = 2) -> torch.nn.Module:
    return zerolite.shard(net(torch.float64), stage=stage)


def weight() -> torch.nn.Parameter:
    """Of a model that lives as long as it, as users' models do: a parameter alone keeps no engine alive."""
    owner = model()
    parameter = owner[0].weight
    parameter.owner = owner
    return parameter


# Each is tried on our optimizer and on torch's AdamW: the error's class is torch's. `w` is a parameter of a model.
REFUSED = {
    "a tensor": lambda make, w: make(w),
    "text": lambda make, w: make("weights"),
    "numbers": lambda make, w: make([1.0, 2.0]),
    "a set": lambda make, w: make([{"params": {w}}]),
    "nothing": lambda make, w: make([]),
    "an empty generator": lambda make, w: make(p for p in ()),
    "no leaf": lambda make, w: make([w * 2]),
    "in two groups": lambda make, w: make([{"params": [w]}, {"params": [w]}]),
    "names of some": lambda make, w: make([("weight", w), w]),
    "a group that is none": lambda make, w: make([w]).add_param_group([w]),
    "lr below 0": lambda make, w: make([w], lr=-0.1),
    "lr of two elements": lambda make, w: make([w], lr=torch.tensor([0.1, 0.2])),
    "a beta of 1": lambda make, w: make([w], betas=(1.0, 0.9)),
    "another beta of 1": lambda make, w: make([w], betas=(0.9, 1.0)),
    "betas of two kinds": lambda make, w: make([w], betas=(torch.tensor(0.9), 0.9)),
    "weight_decay below 0": lambda make, w: make([w], weight_decay=-1),
    "an argument that nobody has": lambda make, w: make([w], momentum=0.9),
    "a state dict that is none": lambda make, w: make([w]).load_state_dict([1]),
    "a state dict of nothing": lambda make, w: make([w]).load_state_dict({}),
}

# Each is fine in torch, and refused here with these words.
OUR_OWN = {
    "maximize": (
        "ValueError: .*maximize=True.*negate the loss",
        lambda make, w: make([{"params": [w], "maximize": True}]),
    ),
    "amsgrad": ("ValueError: param group 0 has amsgrad", lambda make, w: make([{"params": [w], "amsgrad": True}])),
    "in a group": (
        "ValueError: lr is a number of at least 0, got -1",
        lambda make, w: make([{"params": [w], "lr": -1}]),
    ),
    "twice": ("ValueError: .*twice in one", lambda make, w: make([w, w])),
    "deepcopy": ("ZeroliteError: .*state_dict()", lambda make, w: copy.deepcopy(make([w]))),
    "pickle": ("ZeroliteError: .*state_dict()", lambda make, w: pickle.dumps(make([w]))),
    "later": (
        "ValueError: param group 0 has capturable=True",
        lambda make, w: stepped_with(make([w]), capturable=True),
    ),
    "loaded": ("ValueError: param group 0 has amsgrad=True", lambda make, w: loaded_with(make([w]), amsgrad=True)),
}


def stepped_with(optimizer, **options):
    optimizer.param_groups[0].update(options)
    optimizer.step()


def loaded_with(optimizer, **options):
    state_dict = optimizer.state_dict()
    optimizer.load_state_dict({**state_dict, "param_groups": [{**state_dict["param_groups"][0], **options}]})


def error_of(call, *arguments) -> str:
    try:
        call(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize("rule", ["AdamW", "Adam", "Lion", "Lamb"])
def test_what_torch_refuses_is_refused_and_what_ours_has_not_by_name(rule):
    for name, call in REFUSED.items():
        theirs = error_of(call, torch.optim.AdamW, torch.nn.Parameter(torch.ones(2, 3)))
        ours = error_of(call, OURS[rule], weight())
        assert ours.split(":")[0] == theirs.split(":")[0] != "nothing", f"{name}: {ours}; torch: {theirs}"
    for name, (words, call) in OUR_OWN.items():
        found = error_of(call, OURS[rule], weight())
        assert re.search(words, found), f"{name}: {found}"


def test_options_of_torch_that_change_no_number_are_taken_and_the_others_named():
    sharded = model()
    for kind, decoupled in ((zerolite.AdamW, True), (zerolite.Adam, False)):
        kind(sharded.parameters(), fused=True, foreach=False, amsgrad=False, maximize=False, capturable=False)
        for option in ("amsgrad", "maximize", "capturable", "differentiable"):
            with pytest.raises(ValueError, match=f"{kind.__name__} was given {option}=True"):
                kind(sharded.parameters(), **{option: True})
        with pytest.raises(ValueError, match=f"decoupled_weight_decay={not decoupled}, which is of another rule"):
            kind(sharded.parameters(), decoupled_weight_decay=not decoupled)
    plain = torch.optim.AdamW(net(torch.float64).parameters())
    with pytest.raises(ValueError, match="decoupled_weight_decay=True, which is of another rule"):
        zerolite.Adam(sharded.parameters()).load_state_dict(plain.state_dict())


def test_state_dicts_of_torch_and_ours_go_on_in_each_other():
    """On one process, where this rank's range of a state is all of it."""
    for rule in PLAIN:
        plain, sharded = Bench(net(torch.float64), PLAIN[rule]), None
        ours = model()
        sharded = Bench(ours, OURS[rule], partial(zerolite.full_params, ours))
        first, second = (bench.make(bench.groups, **OPTIONS) for bench in (plain, sharded))
        for bench, optimizer in ((plain, first), (sharded, second)):
            bench.learn(optimizer)
        states = [copy.deepcopy(optimizer.state_dict()) for optimizer in (first, second)]
        assert states[0]["state"].keys() == states[1]["state"].keys()
        for index, state in states[0]["state"].items():
            assert state.keys() == states[1]["state"][index].keys()
            for name, value in state.items():
                torch.testing.assert_close(states[1]["state"][index][name], value, rtol=1e-9, atol=1e-12)
        first.load_state_dict(states[1])
        second.load_state_dict(states[0])
        for bench, optimizer in ((plain, first), (sharded, second)):
            bench.learn(optimizer)
        assert_equal(sharded.parameters(), plain.parameters(), 1e-9)
