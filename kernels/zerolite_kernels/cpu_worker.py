"""One optimizer process: reads commands from shared memory and runs them on its share of every region.

A worker has one thread a core. Every thread reads every command, does its own fixed share of the region, and counts the
command as done; so a region's elements are always touched from the same core, and nothing is divided at run time.
Threads sleep on an eventfd, and end when the trainer does. Imports neither torch nor zerolite where the host kernels
were built; else `cpu.fallback` serves, which needs torch.

Started as: python -S cpu_worker.py '{"threads": [...], ...}' with the descriptors of `Setup` inherited.
"""

import ctypes
import json
import mmap
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

if __name__ == "__main__":
    # Only the script's own folder is on the path, and `-S` leaves out site-packages.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from zerolite_kernels.cpu.command import FILL, PARTIAL_NUMEL, Command, Execute

RunInFile = Callable[[Execute, mmap.mmap, Command, int, int], None]
Row = ctypes.Array[ctypes.c_uint64]  # a thread's, of 8 numbers

CHUNK_NUMEL = 1024 * PARTIAL_NUMEL  # between two heartbeats

# The control memory, all uint64: a header, a row a thread, a ring of commands, and a ring of times a thread.
SUBMITTED, ARENA_BYTES, IS_STOPPING, NUM_THREADS = range(4)  # of the header
ERROR_OFFSET, ERROR_BYTES = 1024, 3072  # text, zero-terminated, of the first worker that failed
THREADS_OFFSET, THREAD_BYTES = 4096, 64
IS_READY, DONE, HEARTBEAT = range(3)  # of a thread's row
RING_NUMEL = 8192
TIMES_BYTES = RING_NUMEL * 16  # of each command when it began and ended, CLOCK_MONOTONIC in ns


def control_bytes(num_threads: int) -> int:
    """The size of the control memory."""
    return times_offset(num_threads, num_threads)


def times_offset(num_threads: int, thread: int) -> int:
    """Where a thread's ring of times begins in the control memory."""
    return ring_offset(num_threads) + RING_NUMEL * ctypes.sizeof(Command) + thread * TIMES_BYTES


def ring_offset(num_threads: int) -> int:
    """Where the ring of commands begins in it."""
    return THREADS_OFFSET + num_threads * THREAD_BYTES


def share(numel: int, thread: int, num_threads: int) -> tuple[int, int]:
    """[first, last) of a region that a thread works on, cut at multiples of PARTIAL_NUMEL."""
    blocks = -(-numel // PARTIAL_NUMEL)
    cut = [min(blocks * index // num_threads * PARTIAL_NUMEL, numel) for index in (thread, thread + 1)]
    return cut[0], cut[1]


@dataclass(frozen=True)
class Setup:
    """What the trainer tells a worker; numbers of descriptors that it inherits."""

    threads: list[int]  # its own, numbered through all workers
    cores: list[int]  # one a thread; empty: not pinned
    num_threads: int  # of all workers together
    trainer_pid: int
    control_fd: int
    arena_fd: int
    wake_fds: list[int]  # one a thread
    progress_fd: int
    states_fd: int  # file of the states, -1: none
    library: str | None  # the built host kernels; None: torch


class Worker:
    """What the threads of one process share."""

    def __init__(self, setup: Setup):
        self.setup = setup
        self.control_map = mmap.mmap(setup.control_fd, control_bytes(setup.num_threads))
        self.header = (ctypes.c_uint64 * 8).from_buffer(self.control_map)
        self.ring_offset = ring_offset(setup.num_threads)
        self.execute = _load(setup.library)
        self.arenas: list[mmap.mmap] = []  # the last one is the largest; older ones may be in use by another thread
        self.lock = threading.Lock()
        self.trainer_fd = os.pidfd_open(setup.trainer_pid)

    def row(self, thread: int) -> Row:
        """A thread's row of the control memory, shared with the trainer."""
        return (ctypes.c_uint64 * 8).from_buffer(self.control_map, THREADS_OFFSET + thread * THREAD_BYTES)

    def times(self, thread: int) -> Row:
        """A thread's ring of times: begin and end of its last RING_NUMEL commands."""
        offset = times_offset(self.setup.num_threads, thread)
        return (ctypes.c_uint64 * (2 * RING_NUMEL)).from_buffer(self.control_map, offset)

    def command(self, number: int) -> Command:
        """A copy of the command of that number: the trainer may reuse its place once all threads are past it."""
        offset = self.ring_offset + number % RING_NUMEL * ctypes.sizeof(Command)
        return Command.from_buffer_copy(self.control_map, offset)

    def arena(self) -> mmap.mmap:
        """The arena, mapped anew when it has grown."""
        nbytes = self.header[ARENA_BYTES]
        with self.lock:
            if not self.arenas or len(self.arenas[-1]) < nbytes:
                self.arenas.append(mmap.mmap(self.setup.arena_fd, nbytes))
            return self.arenas[-1]

    def fail(self, thread: int) -> None:
        """Leave the reason where the trainer finds it, the traceback on stderr, and end."""
        traceback.print_exc()
        reason = traceback.format_exception_only(*sys.exc_info()[:2])[-1].strip()
        text = f"thread {thread}: {reason}".encode()[: ERROR_BYTES - 1]
        self.control_map[ERROR_OFFSET : ERROR_OFFSET + len(text)] = text
        os._exit(1)


def _load(library: str | None) -> Execute:
    """execute(memory, command, first, last) of the built host kernels, or of what serves in torch."""
    if library is None:
        from zerolite_kernels.cpu.fallback import execute

        return execute
    function = ctypes.CDLL(library).zl_execute
    function.argtypes = [ctypes.c_void_p, ctypes.POINTER(Command), ctypes.c_uint64, ctypes.c_uint64]

    def execute_built(memory: mmap.mmap, command: Command, first: int, last: int) -> None:
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        code = function(base, ctypes.byref(command), first, last)
        if code != 0:
            fields = ("op", "rule", "states", "gradient_dtype", "parameter_kind", "numel", "first", "last")
            raise ValueError(f"the kernels know no command { ({n: getattr(command, n) for n in fields}) }")

    return execute_built


def run_thread(worker: Worker, thread: int, core: int | None, wake_fd: int) -> None:
    """One thread's life: report ready, do every command in order, sleep between them, end when told to."""
    setup = worker.setup
    try:
        if core is not None:
            os.sched_setaffinity(0, {core})  # of this thread
        row, times = worker.row(thread), worker.times(thread)
        run_in_file = None
        if setup.states_fd >= 0:
            from zerolite_kernels.cpu.state_file import StateFile

            run_in_file = StateFile(setup.states_fd).run
        poller = select.poll()
        poller.register(wake_fd, select.POLLIN)
        poller.register(worker.trainer_fd, select.POLLIN)
        row[IS_READY] = 1
        os.eventfd_write(setup.progress_fd, 1)
        while True:
            while row[DONE] < worker.header[SUBMITTED]:
                entry = row[DONE] % RING_NUMEL * 2
                times[entry] = time.monotonic_ns()
                _do(worker, run_in_file, worker.command(row[DONE]), thread, row)
                times[entry + 1] = time.monotonic_ns()
                row[HEARTBEAT] += 1
                row[DONE] += 1  # after the work; the write below is a barrier
                os.eventfd_write(setup.progress_fd, 1)
            if worker.header[IS_STOPPING]:
                return
            ready = {fd for fd, _ in poller.poll()}
            if worker.trainer_fd in ready:
                os._exit(0)  # the trainer is gone
            os.eventfd_read(wake_fd)
    except BaseException:
        worker.fail(thread)


def _do(worker: Worker, run_in_file: RunInFile | None, command: Command, thread: int, row: Row) -> None:
    """This thread's share of one command, a chunk at a time."""
    first, last = share(command.numel, thread, worker.setup.num_threads)
    if command.op != FILL:
        first, last = max(first, command.first), min(last, command.last)

    def execute(memory: mmap.mmap, command: Command, first: int, last: int) -> None:
        worker.execute(memory, command, first, last)
        row[HEARTBEAT] += 1
        if os.getppid() != worker.setup.trainer_pid:
            os._exit(0)

    memory = worker.arena()
    if command.file:
        assert run_in_file is not None, "the moments lie in a file, whose descriptor the trainer did not pass on"
        run_in_file(execute, memory, command, first, last)
        return
    while first < last:
        stop = min(first - first % PARTIAL_NUMEL + CHUNK_NUMEL, last)
        execute(memory, command, first, stop)
        first = stop


def main() -> None:
    """Run the threads of this process until the trainer stops them or is gone."""
    setup = Setup(**json.loads(sys.argv[1]))
    # Ctrl-C and torchrun's SIGTERM reach the whole process group; the trainer decides when its workers end.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if os.getppid() != setup.trainer_pid:
        os._exit(0)
    worker = Worker(setup)
    cores: list[int | None] = list(setup.cores) or [None] * len(setup.threads)
    work = list(zip(setup.threads, cores, setup.wake_fds, strict=True))
    others = [threading.Thread(target=run_thread, args=(worker, *item), daemon=True) for item in work[1:]]
    for other in others:
        other.start()
    run_thread(worker, *work[0])
    for other in others:
        other.join()


if __name__ == "__main__":
    main()
