"""What this rank takes of its host: resident memory of its processes, each page shared by n of them counted as 1/n."""

import time
from dataclasses import dataclass

import psutil

from zerolite.engine.engine import Engine
from zerolite.memory.state_bytes import arena_bytes
from zerolite.shards.bucket import Bucket

# Reading PSS walks the page tables of every process, 10 ms and more a GB: it may take this share of the time.
SHARE = 0.002


@dataclass(frozen=True)
class HostUsage:
    """Bytes of one rank at the end of a step; PSS is of the last time that it was read."""

    process_bytes: int  # PSS of the trainer
    children_bytes: int  # PSS of its optimizer workers and data loaders
    arena_bytes: int  # that trainer and workers share, a part of the PSS once it was touched
    arena: dict[str, int]  # of it, by kind
    pinned_bytes: int  # of it, locked for copies
    file_bytes: int  # of states on a drive

    @property
    def total_bytes(self) -> int:
        return self.process_bytes + self.children_bytes


class HostReader:
    """Reads a `HostUsage` as often as that is cheap."""

    def __init__(self, engine: Engine, buckets: list[Bucket]):
        self._placement, self._buckets = engine.placement, buckets
        self._process = psutil.Process()
        self._next = 0.0
        self.last = self.read()

    def read_if_cheap(self) -> HostUsage:
        """As `read`, with PSS of its last reading if that has taken more than `SHARE` of the time since."""
        return self._with(self._pss) if time.monotonic() < self._next else self.read()

    def read(self) -> HostUsage:
        begin = time.monotonic()
        self._pss = _pss(self._process), sum(map(_pss, self._process.children(recursive=True)))
        end = time.monotonic()
        self._next = end + (end - begin) / SHARE
        return self._with(self._pss)

    def _with(self, pss: tuple[int, int]) -> HostUsage:
        total = self._placement.host_bytes
        self.last = HostUsage(
            process_bytes=pss[0],
            children_bytes=pss[1],
            arena_bytes=total,
            arena=arena_bytes(self._buckets, total),
            pinned_bytes=self._placement.pinned_bytes,
            file_bytes=self._placement.file_bytes,
        )
        return self.last


def _pss(process: psutil.Process) -> int:
    """0 for a process that has ended."""
    try:
        return process.memory_full_info().pss
    except psutil.Error:
        return 0
