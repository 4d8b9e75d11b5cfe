"""Does a model that is dropped in the middle of a backward leave anything to the next one on the same ranks?"""

from __future__ import annotations

import gc
import time

import pytest
import torch
import torch.distributed as dist
from models import Stack, drawn

import zerolite


def raise_in_a_hook(parameter: torch.Tensor) -> None:
    raise ArithmeticError("in a hook")


def norms_after_failures(stage: int) -> list[float | None]:
    """One rank is late when the other has raised already, and forgotten its model and what that was to receive."""
    rank, norms = dist.get_rank(), []
    for late in (0, 1):
        model = zerolite.shard(drawn(Stack).double(), stage=stage)
        model.first.weight.register_post_accumulate_grad_hook(raise_in_a_hook)
        loss = model(torch.ones(4, 5).double() * (rank + 7)).sum()
        if rank == late:
            time.sleep(0.05)
        with pytest.raises(ArithmeticError):
            loss.backward()
        del model, loss
        gc.collect()
        model = zerolite.shard(drawn(Stack).double(), stage=stage)
        optimizer = zerolite.AdamW(model.parameters(), lr=0.0)
        model(torch.ones(4, 5).double() * (rank + 1)).sum().backward()
        optimizer.step()
        norms.append(optimizer.grad_norm)
    return norms


@pytest.mark.parametrize("stage", [1, 3])
def test_the_next_model_has_its_own_gradients(ranks, stage):
    model = drawn(Stack).double()
    for rank in (0, 1):
        (model(torch.ones(4, 5).double() * (rank + 1)).sum() / 2).backward()
    expected = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()]).item()
    for norms in ranks(2, timeout=20).run(norms_after_failures, stage):
        assert norms == pytest.approx([expected] * 2, rel=1e-12)
