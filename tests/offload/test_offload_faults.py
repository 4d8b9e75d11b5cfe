"""A worker that dies or stands still ends every rank with a `WorkerError` that names it; nothing outlives its trainer.

Ranks are forked from one of the pool; each starts its own workers, as a trainer does.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from limits import until
from ranks import Pool
from zerolite_kernels import cpu
from zygote import fork

NUM_WORKERS = 2
END_S = 10.0

pytestmark = pytest.mark.skipif(cpu.path() is None, reason="the host kernels were not built")


@pytest.fixture(scope="module")
def parent() -> Iterator[Pool]:
    """One that has never had gloo's or autograd's threads can be forked safely."""
    pool = Pool()
    yield pool
    pool.close()


def train_for_ever(folder: Path, rank: int, port: int, stage: int, clip: float | None) -> None:
    """Says when it has begun, who its workers are, and what ended it."""
    import zerolite

    store = dist.TCPStore("127.0.0.1", port, 2, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(4)))
    offload = zerolite.Offload(workers=NUM_WORKERS, threads=1)
    model = zerolite.shard(model, stage=stage, offload=offload)
    optimizer = zerolite.AdamW(model.parameters(), lr=1e-3, max_grad_norm=clip)
    pids = [process.pid for process in model._zerolite.placement.host.pool.processes]
    (folder / f"pids-{rank}").write_text(" ".join(map(str, pids)))
    try:
        step = 0
        while True:
            model(torch.ones(2, 256)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step == 2:
                (folder / f"begun-{rank}").touch()
    except BaseException as error:
        (folder / f"end-{rank}.part").write_text(f"{type(error).__name__}: {error}")
        (folder / f"end-{rank}.part").rename(folder / f"end-{rank}")
        raise


def start_two(folder: Path, stage: int, clip: float | None):
    """(children, pids of each rank's workers), training."""
    folder.mkdir()
    # The store outlives the ranks, as torchrun's does.
    store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    arguments = [(folder, rank, store.port, stage, clip) for rank in range(2)]
    children = [fork(lambda given=given: train_for_ever(*given)) for given in arguments]
    until(lambda: len(list(folder.glob("begun-*"))) == 2 or any(folder.glob("end-?")), 60)
    assert not any(folder.glob("end-?")), f"ranks did not begin: {[path.read_text() for path in folder.glob('end-*')]}"
    pids = [[int(pid) for pid in (folder / f"pids-{rank}").read_text().split()] for rank in range(2)]
    return store, children, pids


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def reap(children: list[int], seconds: float) -> list[int | None]:
    """Exit codes; None for one that had to be killed."""
    codes: dict[int, int | None] = {}

    def collect() -> bool:
        for child in children:
            if child not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
        return len(codes) == len(children)

    until(collect, seconds)
    for child in set(children) - codes.keys():
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        codes[child] = None
    return [codes[child] for child in children]


CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 0x40000


def see_no_other_shared_memory() -> None:
    """Give this process and its children a /dev/shm of their own, if root: what others leave there is no leak."""
    libc = ctypes.CDLL(None)
    if libc.unshare(CLONE_NEWNS) == 0:
        libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None)
        libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, None)


def kill_workers(root: Path, trials: int, seed: int, how: int = signal.SIGKILL) -> list[str]:
    """What went wrong in so many trials."""
    import zerolite.offload.pool

    see_no_other_shared_memory()
    if how == signal.SIGSTOP:
        zerolite.offload.pool.STUCK_SECONDS = 3.0
    draw = random.Random(seed)
    failures = []
    for trial in range(trials):
        before = sorted(os.listdir("/dev/shm"))
        folder = root / f"trial-{trial}"
        store, children, pids = start_two(folder, draw.randrange(4), draw.choice([None, 0.5]))
        time.sleep(draw.uniform(0, 0.2))
        rank, worker = draw.randrange(2), draw.randrange(NUM_WORKERS)
        victim = pids[rank][worker]
        os.kill(victim, how)
        began = time.monotonic()
        codes = reap(children, END_S)
        seconds = time.monotonic() - began
        for other in range(2):
            end = folder / f"end-{other}"
            said = end.read_text() if end.exists() else "nothing"
            named = f"rank {rank}: optimizer worker {worker} (pid {victim})"
            if codes[other] != 3 or not said.startswith("WorkerError") or named not in said:
                failures.append(f"trial {trial}: rank {other} ended with {codes[other]} after {seconds:.1f} s: {said}")
        if not until(lambda: not any(is_running(pid) for own in pids for pid in own), 5):  # noqa: B023
            failures.append(f"trial {trial}: workers of {pids} still run")
        if sorted(os.listdir("/dev/shm")) != before:
            failures.append(f"trial {trial}: /dev/shm holds {os.listdir('/dev/shm')}")
        for own in pids:
            for pid in own:
                if is_running(pid):
                    os.kill(pid, signal.SIGKILL)
        del store
    return failures


def kill_trainers(root: Path, trials: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    failures = []
    for trial in range(trials):
        store, children, pids = start_two(root / f"trial-{trial}", draw.randrange(4), draw.choice([None, 0.5]))
        time.sleep(draw.uniform(0, 0.2))
        for child in children:
            os.kill(child, signal.SIGKILL)
        reap(children, END_S)
        if not until(lambda: not any(is_running(pid) for own in pids for pid in own), 5):  # noqa: B023
            failures.append(f"trial {trial}: workers of {pids} outlived their trainers by 5 seconds")
        del store
    return failures


@pytest.mark.parametrize("trials", [10, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_a_killed_worker_ends_every_rank_with_its_name(parent, tmp_path, trials):
    (failures,) = parent(1, distributed=False, timeout=15.0 * trials + 60).run(kill_workers, tmp_path, trials, 0)
    print(f"{trials} workers killed: {len(failures)} failures")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("trials", [3, pytest.param(30, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_no_worker_outlives_a_killed_trainer(parent, tmp_path, trials):
    (failures,) = parent(1, distributed=False, timeout=15.0 * trials + 60).run(kill_trainers, tmp_path, trials, 1)
    print(f"{trials} pairs of trainers killed: {len(failures)} failures")
    assert not failures, "\n".join(failures)


def test_a_stopped_worker_is_an_error_within_seconds(parent, tmp_path):
    """SIGSTOP: alive, and silent."""
    (failures,) = parent(1, distributed=False, timeout=90).run(kill_workers, tmp_path, 1, 2, signal.SIGSTOP)
    assert not failures, "\n".join(failures)
