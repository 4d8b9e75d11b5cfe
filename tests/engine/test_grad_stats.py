"""What ranks exchange before a step: packed and unpacked without loss, and a hash that tells who gathered otherwise."""

from __future__ import annotations

import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Stack
from saved import attempt

import zerolite
from zerolite.engine.grad_stats import BucketStats


@settings(deadline=None, derandomize=True, database=None, max_examples=50)
@given(st.floats(allow_nan=False), st.booleans(), st.lists(st.booleans(), max_size=9))
def test_a_row_comes_back_as_it_was(squares, has_unreduced, was_used):
    """Flags and an fp64 number survive the tensor that travels; the width is known from the number of slots."""
    stats = BucketStats(squares, has_unreduced, was_used)
    row = torch.tensor(stats.pack(), dtype=torch.float64).tolist()
    assert len(row) == BucketStats.width(len(was_used))
    assert BucketStats.unpack(row) == stats


def step_after_other_gathers(is_first_alone: bool) -> list[tuple[str, str]]:
    """What two steps said; before the first, rank 0 may remember another order of gathers than its peer."""
    torch.manual_seed(0)
    model = zerolite.shard(Stack(), stage=3)
    optimizer = zerolite.AdamW(model.parameters(), lr=1e-2)
    said = []
    for step in range(2):
        model(torch.ones(2, 5)).sum().backward()
        if is_first_alone and step == 0 and dist.get_rank() == 0:
            model._zerolite.gather_order_hash += 1
        said.append(attempt(optimizer.step))
    return said


def test_ranks_that_gathered_in_another_order_all_say_so(ranks):
    """NCCL's messages carry no header: there this hash is the only guard. Without a difference nothing is said."""
    assert ranks(2).run(step_after_other_gathers, False) == [[("", "")] * 2] * 2
    for (kind, text), _ in ranks(2).run(step_after_other_gathers, True):
        assert kind == "ZeroliteError" and text.startswith("ranks gathered other parameters, or in another order")
