"""Moments on an NVMe drive: read and written around the update by direct, aligned I/O, three chunks in flight.

While a worker's thread updates chunk k, helper threads read chunk k + 1 and write chunk k - 1; they sleep in `preadv`
and `pwritev`, which release the GIL. Plain O_DIRECT with threads rather than libaio or io_uring: two system calls a
megabyte leave nothing to save, and it needs no package. O_DIRECT because states are read once a step: the page cache
would hold them a second time and evict what the trainer needs. Imports neither torch nor zerolite.
"""

import ctypes
import mmap
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from zerolite_kernels.cpu.command import (
    IN_PLACE_FP64,
    LION,
    PARTIAL_NUMEL,
    STATES_BF16,
    STATES_FP32,
    STATES_INT8,
    Command,
    Execute,
)

CHUNK_NUMEL = 128 * PARTIAL_NUMEL  # 2 MiB of fp32 a state and chunk
NUM_BUFFERS = 3  # being read, updated, written


def address_of(memory: mmap.mmap) -> int:
    """Of its first byte, in this process."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def read(fd: int, memory: memoryview, offset: int) -> None:
    """Fill `memory`, aligned like `offset` to a page, from a file."""
    while memory:
        count = os.preadv(fd, [memory], offset)
        if count == 0:
            raise OSError(f"the file of states ends at byte {offset}, {len(memory)} bytes early")
        memory, offset = memory[count:], offset + count


def write(fd: int, memory: memoryview, offset: int) -> None:
    """Write all of `memory`, aligned like `offset` to a page, to a file."""
    while memory:
        count = os.pwritev(fd, [memory], offset)
        memory, offset = memory[count:], offset + count


class StateFile:
    """One thread's access to the file of states."""

    def __init__(self, fd: int):
        self.fd = fd
        self.threads = ThreadPoolExecutor(4)
        self.buffers: list[tuple[mmap.mmap, mmap.mmap]] = []

    def run(self, execute: Execute, memory: mmap.mmap, command: Command, first: int, last: int) -> None:
        """Execute [first, last) of a command whose moments lie in the file; whole pages, which nobody else touches."""
        if first >= last:
            return
        if not self.buffers:
            size = CHUNK_NUMEL * 8
            self.buffers = [(mmap.mmap(-1, size), mmap.mmap(-1, size)) for _ in range(NUM_BUFFERS)]
        widths = {STATES_FP32: 8 if command.parameter_kind == IN_PLACE_FP64 else 4, STATES_BF16: 2, STATES_INT8: 1}
        width, base = widths[command.states], address_of(memory)
        offsets = [command.exp_avg] if command.rule == LION else [command.exp_avg, command.exp_avg_sq]
        starts = list(range(first - first % PARTIAL_NUMEL, last, CHUNK_NUMEL))

        def transfer(move: Callable[[int, memoryview, int], None], index: int) -> list[Future[None]]:
            start = starts[index]
            nbytes = (min(start + CHUNK_NUMEL, -(-last // PARTIAL_NUMEL) * PARTIAL_NUMEL) - start) * width
            views = [memoryview(buffer)[:nbytes] for buffer in self.buffers[index % NUM_BUFFERS]]
            return [
                self.threads.submit(move, self.fd, view, offset + start * width)
                for view, offset in zip(views, offsets, strict=False)
            ]

        writes: list[list[Future[None]]] = []
        reads = transfer(read, 0)
        for index, start in enumerate(starts):
            _finish(reads)
            if index + 1 < len(starts):
                if index + 1 >= NUM_BUFFERS:
                    _finish(writes[index + 1 - NUM_BUFFERS])  # the buffer's last content is on the drive
                reads = transfer(read, index + 1)
            chunk = Command.from_buffer_copy(command)
            # Addresses count from the arena's start, modulo 2**64; element `start` lies at the buffer's.
            moved = [(address_of(b) - start * width - base) % 2**64 for b in self.buffers[index % NUM_BUFFERS]]
            chunk.exp_avg, chunk.exp_avg_sq = moved
            chunk.file = 0
            execute(memory, chunk, max(first, start), min(last, start + CHUNK_NUMEL))
            writes.append(transfer(write, index))
        for futures in writes[-NUM_BUFFERS:]:
            _finish(futures)


def _finish(futures: list[Future[None]]) -> None:
    wait(futures)
    for future in futures:
        future.result()
