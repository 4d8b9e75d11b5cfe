"""At stage 3 few units are whole at a time, whatever goes from block to block."""

import pytest
from models import llama, t5

import zerolite
from zerolite.shards.states import ParameterState

WORLD = 2


def most_units_whole(family: str) -> tuple[int, int]:
    """The largest number of units, the root aside, that were whole or being gathered at once; and of all."""
    import torch

    torch.manual_seed(0)
    model = zerolite.shard(llama(layers=6) if family == "llama" else t5(), stage=3)
    engine, most = model._zerolite, 0
    gather = engine._gather

    def counting(unit, step):
        nonlocal most
        gather(unit, step)
        blocks = [other for other in engine.units if not other.is_root]
        is_here = [any(b.parameters.state is not ParameterState.SHARDED for b in block.buckets) for block in blocks]
        most = max(most, sum(is_here))

    engine._gather = counting
    ids = torch.arange(1, 9).view(1, -1)
    inputs = {"input_ids": ids, "labels": ids}
    model(**inputs).loss.backward()
    return most, len(engine.units)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_units_are_freed_while_forward_and_backward_run(ranks, family):
    """A unit, its neighbour on the way and one that is about to be freed: no more, also where blocks pass on tuples."""
    for most, num_units in ranks(WORLD).run(most_units_whole, family):
        assert most <= 3 < num_units
