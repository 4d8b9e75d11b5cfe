"""Host memory that trainer and workers share: one anonymous file, grown a tensor at a time, gone with its processes."""

import mmap
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from zerolite.errors import ZeroliteError
from zerolite.offload.system import needed
from zerolite.runtime.device import Device

PAGE_BYTES = mmap.PAGESIZE


class SharedTensor:
    """One tensor of the arena."""

    offset: int  # bytes from the arena's start, a multiple of the page size
    values: torch.Tensor  # 1D, on the host

    def __init__(self, offset: int, values: torch.Tensor):
        self.offset, self.values = offset, values

    @property
    def key(self) -> tuple[int, torch.dtype]:
        """What another tensor must have in common to take over its memory."""
        return self.values.numel(), self.values.dtype

    @property
    def nbytes(self) -> int:
        return self.values.numel() * self.values.element_size()

    def address(self, index: int) -> int:
        """Offset in bytes of one element."""
        return self.offset + index * self.values.element_size()


class Arena:
    """Tensors in the order of their allocation; every byte asked for is a byte used, up to the end of its page."""

    def __init__(self, device: Device):
        self.device = device
        with needed("shared memory for the host's states"):
            self.fd = os.memfd_create("zerolite", os.MFD_CLOEXEC)
        self.nbytes = 0
        self._pinned: list[torch.Tensor] = []
        self._pinned_offsets: set[int] = set()
        self.can_pin = True
        self.close = weakref.finalize(self, _close, os.getpid(), self.fd, self._pinned, device)

    @property
    def pinned_bytes(self) -> int:
        """Of tensors that are locked for copies."""
        return sum(memory.nbytes for memory in self._pinned)

    def allocate(self, numel: int, dtype: torch.dtype) -> SharedTensor:
        """A tensor of undefined values. Its pages are placed by whoever touches them first."""
        offset = self.nbytes
        end = offset + whole_pages(numel, dtype)
        with needed(f"{end:,} bytes of shared memory"):
            os.ftruncate(self.fd, end)
            memory = mmap.mmap(self.fd, end - offset, offset=offset)
        self.nbytes = end
        return SharedTensor(
            offset, torch.frombuffer(memory, dtype=dtype, count=max(numel, 1))[:numel]
        )  # keeps `memory` alive

    def pin(self, shared: SharedTensor) -> None:
        """Lock a tensor for copies to and from the device, once its pages are placed.

        Where the driver cannot, nothing more is tried: it has warned, and copies of pageable memory are right.
        """
        if self.can_pin and shared.values.numel() and shared.offset not in self._pinned_offsets:
            self._pinned_offsets.add(shared.offset)
            whole = shared.values.view(torch.uint8)
            self.can_pin = self.device.pin(whole)
            if self.can_pin:
                self._pinned.append(whole)


def whole_pages(numel: int, dtype: torch.dtype) -> int:
    """Bytes of the arena that a tensor takes: its own, up to the end of a page; at least one."""
    return -(-max(numel, 1) * dtype.itemsize // PAGE_BYTES) * PAGE_BYTES


def _close(trainer: int, fd: int, pinned: list[torch.Tensor], device: Device) -> None:
    if os.getpid() != trainer:
        return  # a fork of the trainer, which has no CUDA
    try:
        if pinned:
            device.unpin(pinned)
    finally:
        pinned.clear()
        os.close(fd)


def check_available(needed_bytes: int, num_local_ranks: int, what: str) -> None:
    """ZeroliteError where this machine has not the memory that its ranks are about to take, each `needed_bytes`."""
    available = available_bytes()
    if needed_bytes * num_local_ranks > available:
        raise ZeroliteError(
            f"{what} takes {needed_bytes / 2**30:.2f} GiB of host memory on each of {num_local_ranks} ranks of this "
            f"machine, {needed_bytes * num_local_ranks / 2**30:.2f} GiB in all, and {available / 2**30:.2f} GiB are "
            'free: use more machines, smaller states (Offload(states="bf16" or "int8")), or Offload(path=...)'
        )


def available_bytes() -> int:
    """Memory that can be taken now without swapping: the machine's or, where it is less, the control group's."""
    return min([psutil.virtual_memory().available, *_bytes_of_group()])


def memory_group() -> str:
    """What tells processes apart that have a limit of memory of their own; "" where the machine's memory is all."""
    if not any(True for _ in _bytes_of_group()):
        return ""
    return f"{os.stat('/proc/self/ns/cgroup').st_ino} {_lines('/proc/self/cgroup')}"


def _bytes_of_group() -> Iterator[int]:
    """What the control group leaves, where it has a limit."""
    for line in _lines("/proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            folder, limit, used = Path("/sys/fs/cgroup") / path.strip("/"), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            folder = Path("/sys/fs/cgroup/memory") / path.strip("/")
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        values = [_lines(folder / name)[:1] for name in (limit, used)]
        if all(value and value[0].isdigit() for value in values):
            cached = dict(line.split() for line in _lines(folder / "memory.stat")).get("inactive_file", 0)
            yield int(values[0][0]) - int(values[1][0]) + int(cached)


def _lines(path) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
