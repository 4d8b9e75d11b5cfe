"""The host side of one engine: its arena, its workers, its file of states, and the streams between host and device."""

import os
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from zerolite_kernels import cpu
from zerolite_kernels.cpu.command import FILL, PARTIAL_NUMEL, Command

from zerolite.config import Offload
from zerolite.errors import ZeroliteError
from zerolite.offload.arena import Arena, SharedTensor, check_available
from zerolite.offload.cores import cores_of
from zerolite.offload.fetch import FetchQueue
from zerolite.offload.pool import Pool
from zerolite.offload.system import needed
from zerolite.runtime.device import Device


class LocalRanks(NamedTuple):
    """Ranks of the model on this machine."""

    number: int  # this rank's, for errors
    local_rank: int  # this rank's, among those that may run on the same cores
    num_sharing_cores: int
    num_sharing_memory: int


class Host:
    """Arena and workers of this rank; they end with the engine that holds it."""

    def __init__(
        self,
        offload: Offload,
        device: Device,
        local: LocalRanks,
        name: str,
        on_failure: Callable[[str], None],
    ):
        """name: of the rank, for errors."""
        if cpu.path() is None:
            if offload.path is not None or offload.states != "fp32":
                raise ValueError(
                    "Offload(path=...) and states other than fp32 need the kernels that are built at install time: "
                    "install a C++ compiler and run `pip install -e .` again"
                )
            warnings.warn(
                "zerolite's host kernels were not built (no C++ compiler at install time): torch's AdamW steps in the "
                "workers, about half as fast and with torch's memory in each; install a compiler and zerolite again",
                stacklevel=2,
            )
        self.offload, self.device = offload, device
        self.num_local_ranks = local.num_sharing_memory
        self.d2h_stream, self.h2d_stream = device.new_stream(), device.new_stream()
        self.arena = Arena(device)
        # Memory of optimizers that are gone, for the next one.
        self.free_tensors: defaultdict[tuple[int, torch.dtype], list[SharedTensor]] = defaultdict(list)
        self.free_offsets: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        self._scratch: SharedTensor | None = None
        self.states_fd, self.states_bytes = -1, 0
        if offload.path is not None:
            self.states_fd = _open_direct(Path(offload.path))
            weakref.finalize(self, os.close, self.states_fd)
        num_workers = offload.workers or 1
        num_threads = None if offload.threads is None else offload.threads * num_workers
        with needed(f"{name}: which cores this machine has"):
            cores = cores_of(local.local_rank, local.num_sharing_cores, num_threads)
            if len(cores) < num_workers:
                cores = cores_of(local.local_rank, local.num_sharing_cores, num_workers)
        self.fetch_queue = queue = FetchQueue()

        def fail(message: str) -> None:
            queue.has_failed = True
            on_failure(message)

        try:
            self.pool = Pool(self.arena.fd, num_workers, cores, self.states_fd, name, fail)
        except BaseException:
            self.arena.close()  # here, since whoever keeps the error keeps this frame, and with it the arena
            raise

    def check_memory(self, needed_bytes: int, what: str) -> None:
        """ZeroliteError, with both sizes, where the machine has less than its ranks are about to take."""
        with needed(f"how much memory is free for {what}"):
            check_available(needed_bytes, self.num_local_ranks, what)

    def allocate(self, numel: int, dtype: torch.dtype, is_copied: bool = False) -> SharedTensor:
        """Zeros whose pages are placed by the threads that will work on them.

        is_copied: to or from the device, so it is pinned. The rest, two thirds and more, is not: pinning takes about
        0.1 s a GB, and the pages from the system.
        """
        free = self.free_tensors[numel, dtype]
        if free:
            # Reused memory may still be the target of queued commands. Fresh memory cannot, so it needs no wait.
            self.wait(self.pool.submitted)
        shared = free.pop() if free else self.arena.allocate(numel, dtype)
        fill = Command(op=FILL, numel=shared.nbytes, last=shared.nbytes, gradient=shared.offset)
        self.wait(self.submit([fill], "placing memory"))
        if is_copied:
            self.arena.pin(shared)
        return shared

    @property
    def free_bytes(self) -> int:
        return sum(shared.nbytes for tensors in self.free_tensors.values() for shared in tensors)

    def allocate_in_file(self, numel: int, itemsize: int) -> int:
        """Offset of a page-aligned range of the file of states, with room for whole partial blocks."""
        if self.free_offsets[numel, itemsize]:
            self.wait(self.pool.submitted)  # the last owner's steps may still be written
            return self.free_offsets[numel, itemsize].pop()
        offset = self.states_bytes
        self.states_bytes += whole_blocks(numel, itemsize)
        try:
            os.posix_fallocate(self.states_fd, offset, max(self.states_bytes - offset, 1))
        except OSError as error:
            free = os.fstatvfs(self.states_fd)
            raise ZeroliteError(
                f"{self.offload.path} has no room for the states: {(self.states_bytes - offset) / 2**30:.2f} GiB more "
                f"are needed and {free.f_bavail * free.f_frsize / 2**30:.2f} GiB are free ({error}); use a larger drive"
            ) from error
        return offset

    def scratch(self, numel: int) -> SharedTensor:
        """fp64 that workers leave results in; the same memory each time."""
        if self._scratch is None or self._scratch.values.numel() < numel:
            self._scratch = self.allocate(max(numel, PARTIAL_NUMEL), torch.float64)
        return self._scratch

    def submit(self, commands: list[Command], label: str) -> int:
        """Hand commands to the workers; the fence behind them."""
        return self.pool.submit(commands, label, self.arena.nbytes)

    def wait(self, fence: int) -> None:
        """Sleep until the workers have passed the fence; WorkerError where one cannot."""
        self.pool.wait(fence)


def whole_blocks(numel: int, itemsize: int) -> int:
    """Bytes of the file of states that `numel` elements take: whole partial blocks."""
    return -(-numel // PARTIAL_NUMEL) * PARTIAL_NUMEL * itemsize


def _open_direct(folder: Path) -> int:
    """A file without a name in `folder`, read and written past the page cache; it is gone with its descriptors."""
    if not folder.is_dir():
        raise ValueError(f"Offload(path={str(folder)!r}) is not a folder: make it first, on a local drive")
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ValueError(
            f"Offload(path={str(folder)!r}): its file system takes no direct I/O or no unnamed files ({error}); "
            "name a folder on a local drive (ext4, xfs)"
        ) from error
