"""Does an attempt of torchrun --max-restarts find only its own names in the store, which outlives the ranks?

On several machines too, each of which counts its attempts alone.
"""

from __future__ import annotations

import datetime
import os
import time
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from zerolite_kernels import cpu

import zerolite
from zerolite.medqa import processes
from zerolite.runtime import abort, attempts

LATE_S = 0.7  # of rank 1 in the second attempt: rank 0 would read where the first one's rank 1 listened


def attempt(port: int, number: int, joins: bool) -> float:
    """A step on a rank that torchrun started, whose optimizer is stepped by workers; the first attempt then fails."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    rank = store.add(f"rank of attempt {number}", 1) - 1
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_WORLD_SIZE": "2", "GROUP_RANK": str(rank)}
    environment["TORCHELASTIC_RESTART_COUNT"] = str(number * (1 - rank))  # rank 1's machine has joined anew
    if number == 0:  # what an attempt left that ended before it had begun: a rank that asked, and one that was about to
        store.set(f"{attempts.QUESTIONS}/{store.add(attempts.QUESTIONS, 1)}", "of one that has died")
        store.add(attempts.QUESTIONS, 1)
    with mock.patch.dict(os.environ, environment), mock.patch.object(abort, "distributed_c10d"):
        # Those who join by themselves have no names of an attempt's own.
        abort.distributed_c10d = SimpleNamespace(
            _get_default_store=lambda: store, _abort_process_group=lambda: None, _world=SimpleNamespace(pg_map={})
        )
        time.sleep(LATE_S * rank * number)
        if joins:
            processes.join()
        torch.manual_seed(0)
        model = zerolite.shard(torch.nn.Linear(4, 4), stage=2, offload="cpu")
        optimizer = zerolite.AdamW(model.parameters(), lr=0.1)
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        time.sleep(0.2)  # a failure that was published before arrives by now
        assert not abort.has_failed()
        model(torch.ones(2, 4)).sum().backward()
        dist.barrier()
        if number == 0 and rank == 0:
            abort.publish("rank 0: optimizer worker 0 (pid 1) was killed by SIGKILL")
        return optimizer.grad_norm


@pytest.mark.skipif(cpu.path() is None, reason="the host kernels were not built")
@pytest.mark.parametrize("joins", [True, False], ids=["the application joins", "shard joins"])
def test_an_attempt_neither_joins_nor_hears_the_one_before(ranks, joins, monkeypatch):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    team = ranks(2, distributed=False, timeout=20.0)
    first, second = (team.run(attempt, store.port, number, joins) for number in range(2))
    assert first == second and second[0] > 0


def test_a_rank_that_does_not_come_is_an_error_of_rank_0():
    store = dist.HashStore()
    with pytest.raises(zerolite.ZeroliteError, match="2 of 3 ranks did not start in 0 s"):
        attempts._give_name(store, 3, datetime.timedelta(milliseconds=30))
