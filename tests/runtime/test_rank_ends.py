"""What do the other ranks say, and how soon, when one rank's program ends: by an error, at its end, or by a signal?

Ranks are forks of the zygote whose programs end as the interpreter ends them: hooks of uncaught errors and of the exit.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from limits import load
from models import Stack
from torch import nn
from zygote import zygote

import zerolite
from zerolite.runtime import abort

WORLD = 3
SPEAK_S = 2.0
BROKEN = 2  # the step that a rank does not finish


class Bug(Exception):
    pass


def fail(*given) -> None:
    raise Bug("the user's own mistake")


class FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        fail()


def raises(error: BaseException) -> Callable:
    def do(model, optimizer) -> None:
        raise error

    return do


def in_forward(model: nn.Module, optimizer) -> None:
    model.blocks[1].register_forward_pre_hook(fail)


def in_backward(model: nn.Module, optimizer) -> None:
    model.blocks[1].register_forward_hook(lambda module, given, output: FailsInBackward.apply(output))


def of_a_gradient(model: nn.Module, optimizer) -> None:
    model.blocks[1].register_full_backward_hook(fail)


def in_step(model: nn.Module, optimizer) -> None:
    optimizer.register_step_pre_hook(fail)


MINE = "rank {rank} failed: test_rank_ends.Bug: the user's own mistake"
UNKNOWN = "rank {rank} was killed, ended without a word, or left the process group"
ENDED = "rank {rank} came to the end of its program"
# What a rank does in its step BROKEN, and what the others say of it.
ENDS: dict[str, tuple[Callable, str]] = {
    "forward": (in_forward, MINE),
    "backward": (in_backward, MINE),
    "hook": (of_a_gradient, MINE),
    "step": (in_step, MINE),
    "loader": (raises(StopIteration("no more rows")), "rank {rank} failed: StopIteration: no more rows"),
    "memory": (raises(MemoryError("no room")), "rank {rank} failed: MemoryError: no room"),
    "ctrl-C": (raises(KeyboardInterrupt()), "rank {rank} failed: KeyboardInterrupt"),
    "of torch": (raises(ValueError("no such row")), "rank {rank} failed: ValueError: no such row"),
    "end": (raises(SystemExit(0)), ENDED),
    "kill": (lambda model, optimizer: os.kill(os.getpid(), signal.SIGKILL), UNKNOWN),
    "no exit": (lambda model, optimizer: os._exit(0), UNKNOWN),
}


def live(connection: int, folder: Path, rank: int, broken: int, how: str, stage: int, port: int) -> None:
    """One rank's program, from its begin to its end.."""
    os.close(connection)
    atexit._clear()  # pytest's
    sys.stderr = open(folder / f"said-{rank}", "w", buffering=1)
    try:
        store = dist.TCPStore("127.0.0.1", port, WORLD, is_master=False, timeout=timedelta(seconds=60))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
        torch.manual_seed(0)
        model = zerolite.shard(Stack(7, 3), stage=stage)
        optimizer = zerolite.AdamW(model.parameters(), lr=1e-3)
        for step in range(4):
            if step == BROKEN and rank == broken:
                (folder / "when").write_text(f"{time.time()}")
                ENDS[how][0](model, optimizer)
            if how == "of torch":
                dist.all_reduce(torch.zeros(1))  # a loss for the log
            model(torch.ones(2, 5)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    except SystemExit:
        pass
    except BaseException:
        sys.excepthook(*sys.exc_info())
        (folder / f"spoke-{rank}").write_text(f"{time.time()}")
    atexit._run_exitfuncs()
    os._exit(0)


def end_well(connection: int, folder: Path, rank: int, port: int) -> None:
    """Rank 0 has the store, which ends with it; each listens, as with NCCL or offload."""
    os.close(connection)
    atexit._clear()
    os.dup2(os.open(folder / f"said-{rank}", os.O_WRONLY | os.O_CREAT), 2)  # C++ speaks there
    store = dist.TCPStore("127.0.0.1", port, WORLD, is_master=rank == 0, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    abort.listen(0.5)
    model = zerolite.shard(Stack(7, 1), stage=2)
    model(torch.ones(2, 5)).sum().backward()
    dist.barrier()
    time.sleep(1.5 if rank else 0.0)  # the store's rank ends first
    atexit._run_exitfuncs()
    left = [thread.name for thread in threading.enumerate() if "zerolite" in thread.name]
    (folder / f"left-{rank}").write_text(" ".join(left))
    os._exit(0)


def test_a_run_that_ends_well_says_nothing_and_leaves_no_listener(tmp_path):
    """One that sleeps in the store when the interpreter goes away ends a process that was done by SIGABRT."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start_all(lambda rank: (end_well, tmp_path, rank, port))
    for rank in range(WORLD):
        assert (tmp_path / f"left-{rank}").read_text() == (tmp_path / f"said-{rank}").read_text() == ""


def start_all(of_rank: Callable[[int], tuple]) -> None:
    """Run a function and its arguments as each rank's program, to its end."""
    processes = []
    for rank in range(WORLD):
        work, *arguments = of_rank(rank)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            processes.append(zygote().start(work, theirs, *arguments))
    for process in processes:
        process.wait()


def others_of(broken: int, how: str, stage: int, folder: Path) -> list[tuple[str, float]]:
    """Each other rank's last words, and the seconds until it had said them."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's agent has one
    start_all(lambda rank: (live, folder, rank, broken, how, stage, store.port))
    began = float((folder / "when").read_text())
    others = [rank for rank in range(WORLD) if rank != broken]
    said = [(folder / f"said-{rank}").read_text() for rank in others]
    assert all((folder / f"spoke-{rank}").exists() for rank in others), said
    return [
        (text.strip().splitlines()[-1], float((folder / f"spoke-{rank}").read_text()) - began)
        for rank, text in zip(others, said, strict=True)
    ]


@pytest.mark.parametrize("how", ENDS)
def test_the_others_name_the_rank_and_its_reason_in_two_seconds(tmp_path, how):
    stage, broken = (3, 0) if how in ("backward", "step", "end") else (1, 2)
    for text, seconds in others_of(broken, how, stage, tmp_path):
        assert f"{'because of another' if how == 'of torch' else 'ZeroliteError'}: rank " in text, text
        assert ENDS[how][1].format(rank=broken) in text, text
        assert seconds < SPEAK_S * load(), (seconds, text)
        if how in ("end", "kill", "no exit"):
            assert "another number of batches or steps" in text, text
