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
from zerolite.shards import states
from zerolite.shards.states import ParameterState, ShardState

PARAMETER_WALKS = {
    ("SHARDED", "GATHERING"), ("GATHERING", "UNSHARDED"), ("UNSHARDED", "SHARDED"), ("UNSHARDED", "GATHERING"),
    ("UNSHARDED", "STALE"), ("STALE", "GATHERING"),
}  # fmt: skip
SHARD_WALKS = {("IDLE", "STEPPING"), ("STEPPING", "FETCHING"), ("FETCHING", "IDLE")}


@pytest.mark.parametrize("kind, walks", [(ParameterState, PARAMETER_WALKS), (ShardState, SHARD_WALKS)])
def test_only_the_walks_of_the_design_are_legal(kind, walks):
    """All others raise, with both states and the bucket's name."""
    for before, after in itertools.product(kind, repeat=2):
        if (before.name, after.name) in walks:
            states.check(before, after, "layer.weight")
        else:
            with pytest.raises(ZeroliteError, match=f"bucket layer.weight goes from {before.name} to {after.name}"):
                states.check(before, after, "layer.weight")


def test_what_the_table_has_not_raises_on_a_model():
    """A bucket that is made stale twice, and a fetch of what nobody stepped, name the bucket."""
    model = zerolite.shard(Stack(), stage=2)
    parameters = model._zerolite.units[1].buckets[0].parameters
    parameters._set_state(ParameterState.STALE)
    with pytest.raises(ZeroliteError, match=r"bucket blocks\.0.* goes from STALE to STALE"):
        parameters._set_state(ParameterState.STALE)


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
