"""What the workers of one pool did when, for the trace: they leave the times, the trainer knows what it asked for."""

import ctypes
import mmap
import threading
from collections import deque
from collections.abc import Sequence

from zerolite_kernels.cpu import command as abi
from zerolite_kernels.cpu_worker import DONE, RING_NUMEL, times_offset

from zerolite.runtime.chrome_trace import ChromeTrace, Span, sources

KINDS = {
    abi.STEP: "worker step",
    abi.PREPARE: "worker prepare",
    abi.ACCUMULATE: "worker accumulate",
    abi.NORM: "worker norm",
    abi.FILL: "worker fill",
}


class WorkerSpans:
    """Commands whose times nobody has read yet, in the order of their numbers."""

    def __init__(self, control: mmap.mmap, rows: Sequence, threads: Sequence[tuple[int, int, int]]):
        """rows: of the control memory, one a thread; threads: (worker, its process, number in the pool)."""
        self._rows, self._threads = rows, threads
        self._times = [
            (ctypes.c_uint64 * (2 * RING_NUMEL)).from_buffer(control, times_offset(len(rows), number))
            for number in range(len(rows))
        ]
        self._expected: deque[tuple[int, int, str]] = deque()  # (number, op, label)
        self._lock = threading.Lock()
        sources.add(self)

    def expect(self, recording: ChromeTrace, number: int, op: int, label: str) -> None:
        """A command is about to be handed over; the one that had its entry in the ring is done."""
        if self._expected and number - self._expected[0][0] >= RING_NUMEL:
            self.collect(recording)
        self._expected.append((number, op, label))

    def collect(self, recording: ChromeTrace) -> None:
        """Move what is done by all threads to the trace."""
        with self._lock:
            done = min(row[DONE] for row in self._rows)
            tracks = [recording.thread(pid, f"worker {worker}", number) for worker, pid, number in self._threads]
            while self._expected and self._expected[0][0] < done:
                number, op, label = self._expected.popleft()
                entry = number % RING_NUMEL * 2
                for track, times in zip(tracks, self._times, strict=True):
                    recording.spans.append(Span(track, KINDS[op], label, times[entry], times[entry + 1]))
