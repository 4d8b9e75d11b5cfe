"""The worker processes by themselves: their start, their shares, the ring, the file of states, and what they refuse."""

from __future__ import annotations

import math
import mmap
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from zerolite_kernels import cpu, cpu_worker
from zerolite_kernels.cpu import command as abi
from zerolite_kernels.cpu import state_file
from zerolite_kernels.cpu.command import Command

from zerolite import WorkerError, ZeroliteError
from zerolite.config import parse_bytes
from zerolite.offload import arena as arenas
from zerolite.offload import cores as cores_module
from zerolite.offload.arena import Arena
from zerolite.offload.pool import Pool
from zerolite.runtime.device import Cpu

needs_kernels = pytest.mark.skipif(cpu.path() is None, reason="the host kernels were not built")
fast = settings(deadline=None, derandomize=True, database=None, max_examples=100)


def make(num_workers: int = 2, num_threads: int = 2) -> tuple[Arena, Pool]:
    arena = Arena(Cpu())
    allowed = sorted(os.sched_getaffinity(0))
    return arena, Pool(arena.fd, num_workers, [allowed[thread % len(allowed)] for thread in range(num_threads)])


def norm_of(field, first: int, last: int, result) -> Command:
    return Command(
        op=abi.NORM, numel=field.values.numel(), first=first, last=last, gradient=field.offset, result=result.offset
    )


@needs_kernels
def test_workers_start_fast_and_without_torch():
    """Half a second at most (the best of three, on a shared machine), and no library of torch's is mapped."""
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        arena, pool = make()
        seconds.append(time.perf_counter() - began)
        for process in pool.processes:
            maps = Path(f"/proc/{process.pid}/maps").read_text()
            assert "_kernels" in maps and "torch" not in maps and "numpy" not in maps
        pool.close()
        assert all(process.returncode == 0 for process in pool.processes)
    assert min(seconds) < 0.5


@needs_kernels
def test_every_thread_is_pinned_to_its_core():
    arena, pool = make(1, 2)
    allowed = sorted(os.sched_getaffinity(0))
    (process,) = pool.processes
    masks = [os.sched_getaffinity(int(task.name)) for task in Path(f"/proc/{process.pid}/task").iterdir()]
    expected = {frozenset({allowed[thread % len(allowed)]}) for thread in range(2)}
    assert expected <= {frozenset(mask) for mask in masks}
    pool.close()


@fast
@given(st.integers(0, 10**6), st.integers(1, 40))
def test_shares_cover_a_region_once_at_whole_partial_blocks(numel, num_threads):
    """No element is done twice or by nobody, and no partial block by two threads."""
    shares = [cpu_worker.share(numel, thread, num_threads) for thread in range(num_threads)]
    assert shares[0][0] == 0 and shares[-1][1] == numel
    assert all(before[1] == after[0] for before, after in zip(shares, shares[1:], strict=False))
    assert all(first <= last and (first % abi.PARTIAL_NUMEL == 0 or first == numel) for first, last in shares)
    blocks = [math.ceil((last - first) / abi.PARTIAL_NUMEL) for first, last in shares]
    assert max(blocks) - min(blocks) <= 1  # even


@fast
@given(st.integers(1, 16), st.integers(1, 16), st.one_of(st.none(), st.integers(1, 40)))
def test_ranks_of_a_machine_share_its_cores(num_allowed, num_ranks, num_threads):
    """Threads lie on allowed cores; ranks share none while there are enough; a thread is not left without a core."""
    allowed = set(range(0, 2 * num_allowed, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda pid: allowed)
        patch.setattr(cores_module, "_siblings", lambda core: {core})
        patch.setattr(cores_module, "_node", lambda core: core % 3)
        chosen = [cores_module.cores_of(rank, num_ranks, num_threads) for rank in range(num_ranks)]
    for cores in chosen:
        assert cores and set(cores) <= allowed
        assert num_threads is None or len(cores) == num_threads
    if num_allowed >= num_ranks:
        assert sum(len(set(cores)) for cores in chosen) == len(set().union(*chosen))


def test_a_thread_takes_a_physical_core_of_its_own(monkeypatch):
    """Eight hardware threads of four cores: one thread a core, and one core left to the trainer."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(cores_module, "_siblings", lambda core: {core % 4, core % 4 + 4})
    monkeypatch.setattr(cores_module, "_node", lambda core: 0)
    assert cores_module.cores_of(0, 1, None) == [1, 2, 3]
    assert cores_module.cores_of(0, 1, 6) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("num_cores, num_left", [(1, 0), (2, 1), (7, 1), (8, 2), (64, 2)])
def test_cores_are_left_to_the_trainer(monkeypatch, num_cores, num_left):
    """One to feed the device, two where there are many; a lone core is shared."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(num_cores)))
    monkeypatch.setattr(cores_module, "_siblings", lambda core: {core})
    assert cores_module.cores_of(0, 1, None) == list(range(num_left, num_cores))


@needs_kernels
def test_more_commands_than_the_ring_holds():
    """The trainer waits for room; every command is done once."""
    arena, pool = make()
    term, total = arena.allocate(128, torch.float32), arena.allocate(128, torch.float32)
    term.values.fill_(1.0)
    total.values.zero_()
    add = Command(
        op=abi.ACCUMULATE,
        numel=128,
        last=128,
        gradient=term.offset,
        parameter=total.offset,
        parameter_kind=abi.IN_PLACE_FP32,
    )
    count = 2 * cpu_worker.RING_NUMEL + 5
    pool.wait(pool.submit([add] * count, "adding", arena.nbytes))
    assert set(total.values.tolist()) == {float(count)}
    pool.close()


@needs_kernels
def test_the_arena_grows_under_running_workers():
    arena, pool = make()
    for numel in (1000, 3_000_000, 128):
        field, result = arena.allocate(numel, torch.float32), arena.allocate(numel // 4096 + 1, torch.float64)
        field.values.copy_(torch.arange(numel) % 7)
        pool.wait(pool.submit([norm_of(field, 0, numel, result)], "summing", arena.nbytes))
        assert result.values.sum() == field.values.double().square().sum()
    pool.close()


@fast
@given(st.lists(st.integers(0, 100_000), min_size=1, max_size=8))
def test_fields_share_no_byte_and_waste_less_than_a_page(sizes):
    """No rounding to powers of two: the arena's size is the sum of what was asked for, in pages."""
    arena = Arena(Cpu())
    fields = [arena.allocate(numel, torch.float32) for numel in sizes]
    for index, field in enumerate(fields):
        field.values.fill_(index)
    assert all(set(field.values.tolist()) <= {float(index)} for index, field in enumerate(fields))
    assert arena.nbytes <= sum(4 * numel + arenas.PAGE_BYTES for numel in sizes)
    assert os.fstat(arena.fd).st_size == arena.nbytes


@needs_kernels
def test_a_command_that_the_kernels_do_not_know_is_an_error_with_its_text():
    arena, pool = make()
    field = arena.allocate(128, torch.float32)
    number = pool.submit([Command(op=99, numel=128, last=128, gradient=field.offset)], "stepping w", arena.nbytes)
    with pytest.raises(WorkerError, match=r"rank 0: optimizer worker \d.*no command.*in doubt: stepping w"):
        pool.wait(number)
    with pytest.raises(WorkerError, match="in doubt: stepping w"):  # and for ever
        pool.submit([], "more", arena.nbytes)


@needs_kernels
def test_a_dead_worker_is_noticed_without_waiting_for_it():
    arena, pool = make()
    pool.processes[1].send_signal(signal.SIGKILL)
    pool.processes[1].wait()
    with pytest.raises(WorkerError, match="optimizer worker 1 .*SIGKILL.*idle"):
        pool.check()


@needs_kernels
def test_workers_leave_ctrl_c_to_the_trainer():
    arena, pool = make()
    for process in pool.processes:
        process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    field, result = arena.allocate(128, torch.float32), arena.allocate(1, torch.float64)
    field.values.fill_(2.0)
    pool.wait(pool.submit([norm_of(field, 0, 128, result)], "summing", arena.nbytes))
    assert result.values.item() == 4 * 128
    pool.close()


def test_too_little_memory_names_both_sizes(monkeypatch):
    monkeypatch.setattr(arenas, "available_bytes", lambda: 3 * 2**30)
    arenas.check_available(2**30, 3, "offloading")
    with pytest.raises(ZeroliteError, match=r"2.00 GiB .* each of 2 ranks .* 4.00 GiB in all, and 3.00 GiB are free"):
        arenas.check_available(2 * 2**30, 2, "offloading")


def test_available_memory_is_at_most_the_machine_s():
    import psutil

    assert 0 < arenas.available_bytes() <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    "size, expected",
    [(5, 5), ("5", 5), ("1KiB", 1024), ("1.5 GiB", 3 * 2**29), ("20gb", 20 * 10**9), ("7 b", 7), (0, 0)],
)
def test_sizes_in_bytes(size, expected):
    assert parse_bytes(size) == expected


@pytest.mark.parametrize("size", ["", "GiB", "1 parsec", "-1", -1, True, 1.5, "1e9", None])
def test_what_is_no_size_is_refused(size):
    with pytest.raises(ValueError, match="number of bytes"):
        parse_bytes(size)


@needs_kernels
@pytest.mark.parametrize("rule, states", [(abi.ADAMW, 0), (abi.ADAMW, 1), (abi.LION, 0), (abi.ADAM, 2)])
def test_states_in_a_file_step_as_in_memory(tmp_path, monkeypatch, rule, states):
    """Whatever ranges, over several chunks and in any order, the drive ends with the bytes that memory ends with."""
    try:
        fd = os.open(tmp_path, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT)
    except OSError as error:
        pytest.skip(f"{tmp_path} takes no direct I/O: {error}")
    monkeypatch.setattr(state_file, "CHUNK_NUMEL", 2 * abi.PARTIAL_NUMEL)
    numel, width = 11 * abi.PARTIAL_NUMEL + 256, {0: 4, 1: 2, 2: 1}[states]
    padded = math.ceil(numel / abi.PARTIAL_NUMEL) * abi.PARTIAL_NUMEL
    os.posix_fallocate(fd, 0, 2 * padded * width)
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(numel, generator=generator)
    start = torch.randn(numel, generator=generator)
    scales = [torch.zeros(numel // abi.BLOCK_NUMEL + 1) for _ in range(2)]
    memory = mmap.mmap(-1, mmap.PAGESIZE)  # an arena's stand-in: addresses count from it
    base = state_file.address_of(memory)
    execute = cpu_worker._load(str(cpu.path()))
    results = []
    for is_file in (False, True):
        for scale in scales:
            scale.zero_()
        parameter, moments = start.clone(), torch.zeros(2 * padded * width, dtype=torch.uint8)
        states_on_drive = state_file.StateFile(fd)
        for step in (1, 2):
            for first, last in [(0, 128), (128, 5 * 4096 + 128), (5 * 4096 + 128, numel - 128), (numel - 128, numel)]:
                where = 0 if is_file else moments.data_ptr() - base
                command = Command(
                    op=abi.STEP, rule=rule, states=states, numel=numel, first=first, last=last, multiplier=1.0,
                    gradient=(gradient.data_ptr() - base) % 2**64, parameter=(parameter.data_ptr() - base) % 2**64,
                    exp_avg=where % 2**64, exp_avg_sq=(where + padded * width) % 2**64,
                    exp_avg_scale=(scales[0].data_ptr() - base) % 2**64,
                    exp_avg_sq_scale=(scales[1].data_ptr() - base) % 2**64,
                    lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, seed=step, file=int(is_file),
                    bias_correction1=1 - 0.9**step, bias_correction2_sqrt=math.sqrt(1 - 0.99**step),
                )  # fmt: skip
                if is_file:
                    states_on_drive.run(execute, memory, command, first, last)
                else:
                    execute(memory, command, first, last)
        if is_file:
            whole = mmap.mmap(-1, 2 * padded * width)
            state_file.read(fd, memoryview(whole), 0)
            moments = torch.frombuffer(whole, dtype=torch.uint8)
        used = numel * width
        parts = [moments[:used], moments[padded * width : padded * width + used]]
        results.append([parameter, *(part.clone() for part in parts), *(scale.clone() for scale in scales)])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True))
    assert not torch.equal(results[0][0], start)
    os.close(fd)
