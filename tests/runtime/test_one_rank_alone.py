"""Does a call that all ranks must make, made by one alone, end on all of them with an error that names it and them?"""

from __future__ import annotations

import datetime
import tempfile
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from limits import load
from models import Stack, drawn
from ranks import RankError
from saved import attempt, rank
from torch.distributed.device_mesh import DeviceMesh

import zerolite
from zerolite.runtime import abort, long_waits

X = torch.ones(4, 5)
SECONDS = 2.0  # from the first rank's error to the last one's


def trained(stage: int, offload: str | None = None, mesh: DeviceMesh | None = None):
    """A model with gradients, behind a step."""
    model = zerolite.shard(drawn(Stack), stage=stage, offload=offload, mesh=mesh)
    optimizer = zerolite.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer)
    backward(model)
    return model, optimizer


def backward(model) -> None:
    model(X).square().mean().backward()


def train(model, optimizer) -> None:
    backward(model)
    optimizer.step()
    optimizer.zero_grad()


def save(model, optimizer) -> None:
    zerolite.save(model, Path(tempfile.gettempdir()) / "never-written", optimizer)


def gather_all(model, optimizer) -> None:
    with zerolite.full_params(model):
        pass


def evaluate(model, optimizer) -> None:
    with torch.no_grad():
        model.eval()(X)


def read_in_forward(model, optimizer) -> None:
    hook = model.blocks[2].register_forward_pre_hook(lambda module, args: model.blocks[0].up.weight.sum() and None)
    backward(model)
    hook.remove()


def clip(model, optimizer) -> None:
    optimizer.clip_grad_norm_(1.0)


def clip_as_torch(model, optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def log_a_norm(model, optimizer) -> None:
    model.last.weight.grad.norm()


def step(model, optimizer) -> None:
    optimizer.step()


# What rank 0 does while rank 1 trains on, and what both errors say of rank 0.
ALONE = {
    save: "rank 0 is in zerolite's save, at test_one_rank_alone.py:",
    gather_all: "rank 0 is in zerolite's full_params, at test_one_rank_alone.py:",
    evaluate: "rank 0 is in the forward of (root), at test_one_rank_alone.py:",
    read_in_forward: "rank 0 is in a read of a parameter of blocks.0, at test_one_rank_alone.py:",
    clip: "rank 0 is in AdamW.clip_grad_norm_, at test_one_rank_alone.py:",
    clip_as_torch: "rank 0 is in an operation on a parameter's .grad, at test_one_rank_alone.py:",
    log_a_norm: "rank 0 is in an operation on a parameter's .grad, at test_one_rank_alone.py:",
    step: "rank 0 is in AdamW.step, at test_one_rank_alone.py:",
}


def alone_while_the_other_trains(call, stage: int) -> tuple[float, str, str]:
    model, optimizer = trained(stage)
    optimizer.zero_grad() if call is read_in_forward else None

    def go_on() -> None:
        if rank() == 0:
            call(model, optimizer)
        for _ in range(3):
            train(model, optimizer)

    kind, text = attempt(go_on)
    return time.monotonic(), kind, text


@pytest.mark.parametrize("call", ALONE, ids=lambda call: call.__name__)
def test_both_ranks_hear_which_call_was_made_and_where(ranks, call):
    results = ranks(2).run(alone_while_the_other_trains, call, 3)
    for _, kind, text in results:
        assert kind == "ZeroliteError" and ALONE[call] in text, text
        assert "rank 1 is in " in text.replace("rank 1 is in no call", ""), text
    assert abs(results[0][0] - results[1][0]) < SECONDS * load()


def alone_while_the_other_waits(stage: int, offload: str | None, timeout: float) -> tuple[float, str, str]:
    group = dist.new_group([0, 1], timeout=datetime.timedelta(seconds=timeout))
    model, optimizer = trained(stage, offload, DeviceMesh.from_group(group, "cpu"))
    optimizer.step()

    def call() -> None:
        if rank() == 0:
            model.state_dict() if offload is not None else evaluate(model, optimizer)
        else:
            dist.barrier()  # of another group, which waits for half an hour

    kind, text = attempt(call)
    return time.monotonic(), kind, text


@pytest.mark.parametrize("stage, offload", [(3, None), (2, "cpu")])
def test_at_the_timeout_the_error_tells_where_the_others_are(ranks, stage, offload):
    """The rank that waits in a collective that is none of zerolite's is ended, too."""
    first, second = ranks(2).run(alone_while_the_other_waits, stage, offload, 2.0)
    assert first[1] == "ZeroliteError" and "gathering first.weight" in first[2], first[2]
    assert "rank 0 is in " in first[2] and "rank 1 is in no call of zerolite, at test_one_rank" in first[2], first[2]
    assert "dist.barrier()" in first[2]
    assert second[1] == "RuntimeError" and abs(second[0] - first[0]) < SECONDS * load()


def late(seconds: float) -> list[str]:
    long_waits.PATIENCE_SECONDS = 1.0
    try:
        model, optimizer = trained(3)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            if rank() == 1:
                time.sleep(seconds)  # another program's work
            train(model, optimizer)
            return [str(one.message) for one in said]
    finally:
        long_waits.PATIENCE_SECONDS = 60.0


def test_a_rank_that_waits_long_says_for_whom_and_goes_on(ranks):
    first, second = ranks(2).run(late, 4.0)
    (said,) = [text for text in first if "has waited" in text]
    assert "rank 0 is in the forward of (root), at test_one_rank_alone.py" in said
    assert "rank 1 is in no call of zerolite, at test_one_rank_alone.py" in said and "time.sleep(seconds)" in said
    assert not second


def raise_alone() -> None:
    model, optimizer = trained(3)
    if rank() == 1:
        raise ValueError("a mistake of one rank")
    train(model, optimizer)


def test_a_rank_that_has_ended_is_said_to_be_gone(ranks):
    with pytest.raises(RankError, match="a mistake of one rank"):
        ranks(2).run(raise_alone)


def ended_late() -> float:
    """What this rank's group still adds up, after the listener of a group that is gone has ended its collectives."""
    gone = dist.new_group([0, 1])
    dist.destroy_process_group(gone)
    abort._end_collectives(gone)
    total = torch.ones(1)
    dist.all_reduce(total)
    return total.item()


def test_the_end_of_a_world_that_is_gone_leaves_the_next_one_alone(ranks):
    assert ranks(2).run(ended_late) == [2.0, 2.0]
