"""Is every read and write of memory behind what it depends on? A checker of orders; simulated_device.py feeds it.

On a GPU an operation runs when its stream comes to it, which no test on the CPU sees: there everything has happened by
the next line. So the engine runs here on a third device beside Cpu and Cuda. Its tensors are the CPU's; of each
operation, copy, collective and worker command the checker records on whose timeline it would run, and which bytes it
reads and writes. Timelines are vector clocks: waits and events join them, and two accesses to the same bytes, one of
them a write, must be ordered by them. Nothing that the host happens to wait for (`item`, `tolist`) counts as an order.

    timelines   the host; compute and every other stream; a stream a process group, as NCCL has it; the workers
    memory      a device allocation counts as a write on its stream, since the allocator gives out blocks that this
                stream may still read; a freed or resized storage goes back to that stream, which every access must
                precede, but for streams that `record_stream` named
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch

HOST, COMPUTE, WORKERS = "host", "compute", "workers"
Clock = dict[str, int]


def join(one: Clock, other: Clock) -> Clock:
    """The earliest clock behind both."""
    return {name: max(one.get(name, 0), other.get(name, 0)) for name in one.keys() | other.keys()}


class Access(NamedTuple):
    """Bytes [start, stop) of one storage, read or written at a tick of a timeline."""

    timeline: str
    tick: int
    start: int
    stop: int
    is_write: bool
    what: str

    def is_before(self, clock: Clock) -> bool:
        return clock.get(self.timeline, 0) >= self.tick

    def __str__(self) -> str:
        return f"{'write' if self.is_write else 'read'} by {self.what} on {self.timeline}"


class Memory:
    """One storage: where it was allocated, and the accesses that later ones must be ordered behind."""

    def __init__(self, home: str | None):
        self.home = home  # the stream whose block it is; None: host memory
        self.accesses: list[Access] = []
        self.recorded: set[str] = set()  # streams that the allocator waits for before it gives the block out again


class Order:
    """The clocks of all timelines and the history of all memory; `findings` says what is not ordered."""

    def __init__(self) -> None:
        self.clocks: dict[str, Clock] = {}
        self.stream = COMPUTE  # the current one
        self.memories: dict[int, Memory] = {}
        self.findings: set[str] = set()
        self.num_operations = 0

    # Timelines #

    def clock(self, timeline: str) -> Clock:
        """Of work that is issued now: behind all that is on the timeline, and behind the host, who issues it."""
        self.clocks[timeline] = join(self.clocks.get(timeline, {}), self.clocks.get(HOST, {}))
        return self.clocks[timeline]

    def tick(self, timeline: str) -> int:
        clock = self.clock(timeline)
        clock[timeline] = clock.get(timeline, 0) + 1
        self.num_operations += 1
        return clock[timeline]

    def record(self, timeline: str | None = None) -> Clock:
        """An event at the timeline's present end; of the current stream by default."""
        return dict(self.clock(timeline or self.stream))

    def wait(self, timeline: str, event: Clock) -> None:
        assert event is not None, "a wait for an event that was never recorded"
        self.clocks[timeline] = join(self.clocks.get(timeline, {}), event)

    # Memory #

    def memory_of(self, storage: torch.UntypedStorage, home: str | None) -> Memory:
        """Its history; one that is new was just allocated on `home`."""
        key = storage._cdata
        if key not in self.memories:
            memory = self.memories[key] = Memory(home)
            if home is not None:
                self._allocate(memory, storage.nbytes())
            weakref.finalize(storage, self._free, key, memory).atexit = False
        return self.memories[key]

    def is_host(self, tensor: torch.Tensor) -> bool:
        memory = self.memories.get(tensor.untyped_storage()._cdata)
        return memory is not None and memory.home is None

    def access(self, timeline: str, tick: int, tensor: torch.Tensor, is_write: bool, what: str) -> None:
        if tensor.numel() == 0:
            return
        size = tensor.element_size()
        first = tensor.storage_offset()
        last = first + sum(stride * (length - 1) for stride, length in zip(tensor.stride(), tensor.shape, strict=True))
        memory = self.memory_of(tensor.untyped_storage(), self.stream)
        self.access_bytes(memory, Access(timeline, tick, first * size, (last + 1) * size, is_write, what))

    def access_bytes(self, memory: Memory, new: Access) -> None:
        clock, kept = self.clocks[new.timeline], []
        for old in memory.accesses:
            overlaps = old.start < new.stop and new.start < old.stop
            if overlaps and (old.is_write or new.is_write) and not old.is_before(clock):
                self.findings.add(f"{new} is not behind the {old}")
            is_covered = new.start <= old.start and old.stop <= new.stop
            # What is ordered before the new access is so before all that come after it.
            if not (is_covered and (new.is_write or (old.timeline == new.timeline and not old.is_write))):
                kept.append(old)
        memory.accesses = [*kept, new]

    def _allocate(self, memory: Memory, nbytes: int) -> None:
        home = memory.home
        assert home is not None
        tick = self.clock(home).get(home, 0)
        memory.accesses = [Access(home, tick, 0, max(nbytes, 1), True, "the allocation")]

    def _check_free(self, memory: Memory, how: str) -> None:
        if memory.home is not None:
            clock = self.clock(memory.home)
            for old in memory.accesses:
                if not old.is_before(clock) and old.timeline not in memory.recorded:
                    self.findings.add(f"memory of {memory.home} is {how} before the {old}")

    def _free(self, key: int, memory: Memory) -> None:
        del self.memories[key]
        self._check_free(memory, "freed")

    def resize(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        memory = self.memory_of(storage, self.stream)
        if storage.nbytes() > nbytes:
            self._check_free(memory, "resized")
            memory.accesses = []
        if nbytes > 0:
            memory.home = self.stream
            self._allocate(memory, nbytes)
