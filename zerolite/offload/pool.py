"""The worker processes of one rank, and the ring of commands that they all read.

Commands are numbered; a thread has done commands [0, its count). `submit` returns the number behind the last one,
`wait` returns when every thread has counted that far. The trainer and the threads sleep on eventfds; a worker that dies
ends the sleep through its pidfd, one that stands still for STUCK_SECONDS through the heartbeats.
"""

import ctypes
import json
import mmap
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from zerolite_kernels import cpu, cpu_worker
from zerolite_kernels.cpu.command import Command
from zerolite_kernels.cpu_worker import (
    ARENA_BYTES,
    DONE,
    ERROR_BYTES,
    ERROR_OFFSET,
    HEARTBEAT,
    IS_READY,
    IS_STOPPING,
    NUM_THREADS,
    RING_NUMEL,
    SUBMITTED,
    THREAD_BYTES,
    THREADS_OFFSET,
    control_bytes,
    ring_offset,
)

from zerolite.errors import WorkerError
from zerolite.offload.system import needed
from zerolite.offload.worker_spans import WorkerSpans
from zerolite.runtime import trace

STUCK_SECONDS = 10.0
START_SECONDS = 60.0


class Pool:
    """Workers with `len(cores)` threads between them; one trainer thread at a time may call it."""

    def __init__(
        self,
        arena_fd: int,
        num_workers: int,
        cores: Sequence[int],
        states_fd: int = -1,
        name: str = "rank 0",
        on_failure: Callable[[str], None] = lambda message: None,
    ):
        self.name = name
        self.on_failure = on_failure
        self.num_threads = len(cores)
        self.failure: str | None = None
        self._doubt: deque[tuple[int, str]] = deque()  # (number behind its last command, what it works on)
        self.submitted = 0  # commands so far
        self.processes: list[subprocess.Popen] = []
        self.threads_of: list[range] = []
        self._fds: list[int] = []  # closed with the pool
        try:
            with needed(f"{name}: what {num_workers} optimizer workers talk through"):
                control_fd = self._share_control()
                self._wake_fds = [self._own(os.eventfd(0, os.EFD_CLOEXEC)) for _ in cores]
                self._progress_fd = self._own(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            with needed(f"{name}: a process for each of {num_workers} optimizer workers"):
                for worker in range(num_workers):
                    self._start(worker, num_workers, cores, control_fd, arena_fd, states_fd)
            with needed(f"{name}: a descriptor for each of {num_workers} optimizer workers"):
                self._pid_fds = [self._own(os.pidfd_open(process.pid)) for process in self.processes]
        except BaseException:
            _abandon(self.processes, self._fds)
            raise
        self._fds.remove(control_fd)
        os.close(control_fd)
        threads = [
            (w, process.pid, thread) for w, process in enumerate(self.processes) for thread in self.threads_of[w]
        ]
        self._spans = WorkerSpans(self._control, self._rows, threads)
        self._poller = select.poll()
        for fd in (self._progress_fd, *self._pid_fds):
            self._poller.register(fd, select.POLLIN)
        self.close = weakref.finalize(
            self, _end, os.getpid(), self._header, self._wake_fds, self.processes, self._fds, self._spans
        )
        self._sleep_until(lambda: all(row[IS_READY] for row in self._rows), "starting", START_SECONDS)

    def _own(self, fd: int) -> int:
        """A descriptor that is closed with the pool, or with the start that fails."""
        self._fds.append(fd)
        return fd

    def _share_control(self) -> int:
        """The control memory, mapped here; its descriptor, for the workers."""
        control_fd = self._own(os.memfd_create("zerolite-control", os.MFD_CLOEXEC))
        os.ftruncate(control_fd, control_bytes(self.num_threads))
        self._control = mmap.mmap(control_fd, control_bytes(self.num_threads))
        self._header = (ctypes.c_uint64 * 8).from_buffer(self._control)
        self._header[NUM_THREADS] = self.num_threads
        self._rows = [
            (ctypes.c_uint64 * 8).from_buffer(self._control, THREADS_OFFSET + thread * THREAD_BYTES)
            for thread in range(self.num_threads)
        ]
        return control_fd

    def _start(
        self, worker: int, num_workers: int, cores: Sequence[int], control_fd: int, arena_fd: int, states_fd: int
    ) -> None:
        first, last = (self.num_threads * index // num_workers for index in (worker, worker + 1))
        wake_fds = self._wake_fds[first:last]
        library = cpu.path()
        setup = {
            "threads": list(range(first, last)),
            "cores": list(cores[first:last]),
            "num_threads": self.num_threads,
            "trainer_pid": os.getpid(),
            "control_fd": control_fd,
            "arena_fd": arena_fd,
            "wake_fds": wake_fds,
            "progress_fd": self._progress_fd,
            "states_fd": states_fd,
            "library": str(library) if library is not None else None,
        }
        inherited = [control_fd, arena_fd, self._progress_fd, *wake_fds, *([states_fd] if states_fd >= 0 else [])]
        # `-S`: no site-packages, which the kernels do not need; without them torch comes from there.
        command = [sys.executable, *(["-S"] if library is not None else []), str(Path(cpu_worker.__file__))]
        process = subprocess.Popen([*command, json.dumps(setup)], pass_fds=inherited, stdin=subprocess.DEVNULL)
        self.processes.append(process)
        self.threads_of.append(range(first, last))

    def submit(self, commands: Sequence[Command], label: str, arena_bytes: int) -> int:
        """Hand commands to every thread; the number to `wait` for. `label` says in an error what they worked on."""
        self.check()
        self._header[ARENA_BYTES] = arena_bytes
        size, base = ctypes.sizeof(Command), ring_offset(self.num_threads)
        for command in commands:
            if self.submitted - RING_NUMEL >= self.num_done():
                self._wake()
                self.wait(self.submitted - RING_NUMEL + 1)
            offset = base + self.submitted % RING_NUMEL * size
            self._control[offset : offset + size] = bytes(command)
            if trace.recording is not None:
                self._spans.expect(trace.recording, self.submitted, command.op, label)
            self.submitted += 1
            self._header[SUBMITTED] = self.submitted
        self._forget(self.num_done())
        self._doubt.append((self.submitted, label))
        self._wake()
        return self.submitted

    def _wake(self) -> None:
        for fd in self._wake_fds:
            os.eventfd_write(fd, 1)

    def num_done(self) -> int:
        """How many commands all threads have done."""
        return min(row[DONE] for row in self._rows)

    def wait(self, number: int) -> None:
        """Sleep until every thread has done the commands before `number`; WorkerError where one cannot."""
        self._sleep_until(lambda: self.num_done() >= number, "working", STUCK_SECONDS)
        self._forget(number)

    def _forget(self, number: int) -> None:
        while self._doubt and self._doubt[0][0] <= number:
            self._doubt.popleft()

    def check(self) -> None:
        """WorkerError where a worker has died."""
        if self.failure is not None:
            raise WorkerError(self.failure)
        dead = {fd for fd, _ in self._poller.poll(0)} & set(self._pid_fds)
        if dead:
            self._fail(self._pid_fds.index(min(dead)))

    def _sleep_until(self, condition: Callable[[], bool], doing: str, patience: float) -> None:
        if self.failure is not None:
            raise WorkerError(self.failure)
        seen, since = None, time.monotonic()
        while not condition():
            ready = {fd for fd, _ in self._poller.poll(patience * 250)}
            dead = ready & set(self._pid_fds)
            if dead:
                self._fail(self._pid_fds.index(min(dead)))
            if self._progress_fd in ready:
                os.eventfd_read(self._progress_fd)
            beats = [row[HEARTBEAT] for row in self._rows]
            if beats != seen:
                seen, since = beats, time.monotonic()
            elif time.monotonic() - since > patience:
                slowest = min(range(self.num_threads), key=lambda thread: self._rows[thread][DONE])
                worker = next(index for index, threads in enumerate(self.threads_of) if slowest in threads)
                self._fail(worker, f"has not moved for {patience:.0f} seconds while {doing}")

    def _fail(self, worker: int, how: str | None = None) -> None:
        process = self.processes[worker]
        if how is None:
            code = process.wait()
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            text = self._control[ERROR_OFFSET : ERROR_OFFSET + ERROR_BYTES].split(b"\0")[0].decode(errors="replace")
            if text:
                how += f" ({text.strip()})"
        done = min(self._rows[thread][DONE] for thread in self.threads_of[worker])
        labels = list(dict.fromkeys(label for number, label in self._doubt if number > done))
        doubt = f"in doubt: {', '.join(labels[:8])}{' and others' if len(labels) > 8 else ''}" if labels else "idle"
        self.failure = (
            f"{self.name}: optimizer worker {worker} (pid {process.pid}) {how}; {doubt}. The states of this run are "
            "lost: start again from the last checkpoint"
        )
        for other in self.processes:
            other.kill()  # also one that is stopped, and could not end by itself
        self.on_failure(self.failure)
        raise WorkerError(self.failure)


def _abandon(processes: list[subprocess.Popen], fds: list[int]) -> None:
    """Undo a start that failed: no worker and no descriptor stays."""
    for process in processes:
        process.kill()
        process.wait()
    for fd in fds:
        os.close(fd)


def _end(
    trainer: int,
    header,
    wake_fds: list[int],
    processes: list[subprocess.Popen],
    fds: list[int],
    spans: WorkerSpans,
) -> None:
    """Let workers finish what they were given, and end them; nothing in a fork of the trainer (a data loader)."""
    if os.getpid() != trainer:
        return
    header[IS_STOPPING] = 1
    for fd in wake_fds:
        os.eventfd_write(fd, 1)
    for process in processes:
        try:
            process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for fd in fds:
        os.close(fd)
    if trace.recording is not None:
        spans.collect(trace.recording)
        trace.write()  # at the interpreter's exit the last write may be over
