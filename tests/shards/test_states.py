"""States of buckets: the table is what the engine does, and nothing else happens."""

from __future__ import annotations

import itertools

import pytest
import torch
from invariants import check, watch
from models import Stack
from zerolite_kernels import cpu

import zerolite
from zerolite import Offload, ZeroliteError
from zerolite.shards.states import LEGAL, ParameterState, ShardState

PARAMETER_WALKS = {
    ("SHARDED", "GATHERING"), ("GATHERING", "UNSHARDED"), ("UNSHARDED", "SHARDED"), ("UNSHARDED", "GATHERING"),
    ("UNSHARDED", "STALE"), ("STALE", "GATHERING"),
}  # fmt: skip
SHARD_WALKS = {("IDLE", "STEPPING"), ("STEPPING", "FETCHING"), ("FETCHING", "IDLE")}


@pytest.mark.parametrize("kind, walks", [(ParameterState, PARAMETER_WALKS), (ShardState, SHARD_WALKS)])
def test_only_the_walks_of_the_design_are_legal(kind, walks):
    """The table has these transitions and no other."""
    legal = {(before.name, after.name) for before, after in LEGAL if isinstance(before, kind)}
    assert legal == walks and all(type(before) is type(after) for before, after in LEGAL)


@pytest.mark.parametrize("before, after", list(itertools.product(ParameterState, repeat=2)))
def test_what_the_table_has_not_raises_with_both_states_and_the_bucket(before, after):
    """Whatever a bucket's parameters are, they go where the table says, or name themselves."""
    parameters = zerolite.shard(Stack(), stage=2)._zerolite.units[1].buckets[0].parameters
    parameters.state = before
    if (before.name, after.name) in PARAMETER_WALKS:
        parameters._set_state(after)
        assert parameters.state is after
    else:
        with pytest.raises(ZeroliteError, match=rf"blocks\.0.* goes from {before.name} to {after.name}"):
            parameters._set_state(after)


@pytest.mark.skipif(cpu.path() is None, reason="the host kernels were not built")
@pytest.mark.parametrize("before, after", list(itertools.product(ShardState, repeat=2)))
def test_a_shard_on_the_host_is_fetched_once_a_step(before, after):
    """A step before the last one was fetched, or a fetch of what nobody stepped, is an error that names the bucket."""
    shard = zerolite.shard(Stack(), stage=2, offload="cpu")._zerolite.units[1].buckets[0].shard
    shard.state = before
    if (before.name, after.name) in SHARD_WALKS:
        shard._set_state(after)
        assert shard.state is after
    else:
        with pytest.raises(ZeroliteError, match=rf"blocks\.0.* goes from {before.name} to {after.name}"):
            shard._set_state(after)


LAYOUTS = [
    (0, None, {"UNSHARDED"}),
    (2, None, {"UNSHARDED"}),
    (3, None, {"UNSHARDED", "SHARDED", "GATHERING"}),
    (1, Offload(), {"UNSHARDED", "STALE", "GATHERING"}),
    (3, Offload(), {"UNSHARDED", "SHARDED", "GATHERING"}),
    (3, Offload(parameters=True), {"UNSHARDED", "SHARDED", "GATHERING"}),
]


def walk(stage: int, offload: Offload | None):
    """Training with accumulation, a forward alone and whole parameters, checked all along; what was seen."""
    torch.manual_seed(0)
    model = zerolite.shard(Stack(blocks=3), stage=stage, offload=offload)
    optimizer = zerolite.AdamW(model.parameters(), lr=1e-2, max_grad_norm=1.0)
    seen = watch(model)
    for step in range(3):
        for micro in range(2):
            with zerolite.no_sync(model, enabled=step == 1 and micro == 0):
                model(torch.ones(2, 5) * step).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        check(model._zerolite)
        with torch.no_grad():
            model(torch.ones(2, 5))
    with zerolite.full_params(model):
        pass
    return tuple(map(set, seen))


@pytest.mark.skipif(cpu.path() is None, reason="the host kernels were not built")
@pytest.mark.parametrize("stage, offload, expected", LAYOUTS)
def test_states_are_what_memory_shows(ranks, stage, offload, expected):
    """sharded + gathering + unsharded + stale == buckets, slots likewise, done <= submitted <= done + ring."""
    for parameter_states, slot_states in ranks(2).run(walk, stage, offload):
        assert parameter_states == expected
        if offload is not None:
            assert {"free", "filling", "ready"} <= slot_states and slot_states & {"stepping", "stepped", "returning"}
        else:
            assert not slot_states
