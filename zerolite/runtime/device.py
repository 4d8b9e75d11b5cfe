"""The only place that asks CUDA or CPU: streams and events with the same methods on both."""

import contextlib
import os
import warnings
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh


class Cpu:
    """The test bed: one queue (the calling thread), so streams order nothing and events have always happened."""

    backend = "gloo"
    bound: torch.device | None = None  # what `init_process_group(device_id=)` takes
    chunk_numel = 512 * 1024  # what a step works on at once; its scratch, 2 MiB of fp32, stays in a core's cache

    def __init__(self):
        self.device = torch.device("cpu")

    def select(self) -> None:
        """Make it the current device of this thread."""

    def new_stream(self):
        return None

    def on(self, stream, after_current: bool = False):
        """Context in which work goes to `stream`; `after_current`: once what the current stream holds is done."""
        return contextlib.nullcontext()

    def record(self):
        """Event at the present end of the current stream."""
        return None

    def wait(self, event) -> None:
        """Make the current stream (not the host) wait for `event`."""

    def synchronize(self, event) -> None:
        """Make the host wait for `event`."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """target = source on the current stream; one of them may be pinned host memory."""
        target.copy_(source)

    def pin(self, memory: torch.Tensor) -> bool:
        """Lock host memory in place, so that copies from and to it run beside the host; whether that was done."""
        return False

    def memory_counter(self) -> "AllocatorCounter | None":
        """What counts the bytes that tensors take on this device; None where no allocator counts."""
        return None

    def unpin(self, memories: Sequence[torch.Tensor]) -> None:
        """Undo `pin`, once every copy has ended. RuntimeError, after trying all, where the driver refuses one."""


class Cuda:
    """One CUDA device; collectives and copies run on streams of their own beside the compute stream."""

    backend = "nccl"
    chunk_numel = 16 * 1024 * 1024

    def __init__(self, index: int):
        self.device = torch.device("cuda", index)
        self.bound = self.device  # a communicator made at once, on this GPU: a fault shows before the first collective

    def select(self) -> None:
        torch.cuda.set_device(self.device)

    def new_stream(self):
        return torch.cuda.Stream(self.device)

    @contextlib.contextmanager
    def on(self, stream, after_current: bool = False):
        if after_current:
            stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            yield

    def record(self):
        return torch.cuda.current_stream(self.device).record_event()

    def wait(self, event) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def synchronize(self, event) -> None:
        event.synchronize()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def pin(self, memory: torch.Tensor) -> bool:
        with torch.cuda.device(self.device):
            code = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
            if code == 0:
                return True
            self._clear_error()
        # Some drivers cannot lock a mapping (WSL2, some containers). Copies of pageable memory are right.
        warnings.warn(
            f"the driver cannot lock {memory.nbytes:,} bytes of host memory ({_reason(code)}): copies between host and "
            f"{self.device} are right, but slower, and the host waits for them; look at `ulimit -l`, or run outside of "
            "WSL2 or with a container that may lock memory",
            stacklevel=2,
        )
        return False

    def _clear_error(self) -> None:
        """The runtime reports an error again at the next launch: let that be one that does nothing."""
        with contextlib.suppress(RuntimeError):
            torch.empty(1, device=self.device).fill_(0)

    def memory_counter(self) -> "AllocatorCounter | None":
        return AllocatorCounter(self.device)

    def unpin(self, memories: Sequence[torch.Tensor]) -> None:
        torch.cuda.synchronize(self.device)
        codes = [int(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())) for memory in memories]
        for code in filter(None, codes):
            raise RuntimeError(f"the driver cannot unlock host memory of {self.device}: {_reason(code)}")


class AllocatorCounter:
    """torch's CUDA allocator of one device: bytes of all tensors of this process, in blocks of 512."""

    def __init__(self, device: torch.device):
        self.device = device

    @property
    def current_bytes(self) -> int:
        return self._read("allocated_bytes", "current")

    @property
    def reserved_bytes(self) -> int:
        """What the allocator has from the driver, with what no tensor uses."""
        return self._read("reserved_bytes", "current")

    @property
    def device_bytes(self) -> int:
        """Of the whole card."""
        return torch.cuda.get_device_properties(self.device).total_memory

    def take_peak(self) -> int:
        """The most bytes that were alive at once since the last call, which this call begins anew."""
        peak = self._read("allocated_bytes", "peak")
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    def start_history(self) -> None:
        """Record where memory is allocated, for `write_history`."""
        torch.cuda.memory._record_memory_history(max_entries=100_000)

    def write_history(self, path: str) -> None:
        """Write torch's memory snapshot, which pytorch.org/memory_viz shows, and record no more."""
        torch.cuda.memory._dump_snapshot(path)
        torch.cuda.memory._record_memory_history(enabled=None)

    def _read(self, what: str, which: str) -> int:
        # As a nested dict: `torch.cuda.memory_stats` flattens it, which takes several times as long.
        return torch.cuda.memory_stats_as_nested_dict(self.device).get(what, {}).get("all", {}).get(which, 0)


Device = Cpu | Cuda


def of(device: torch.device) -> Device:
    """The queue-and-memory value for a torch device."""
    if device.type == "cuda":
        return Cuda(device.index if device.index is not None else torch.cuda.current_device())
    if device.type == "cpu":
        return Cpu()
    raise ValueError(f"zerolite runs on CUDA and on the CPU, the model lies on {device}: move it to one of them")


def _reason(code: int) -> str:
    return str(torch.cuda.CudaError(code))


def default() -> torch.device:
    """This rank's device where the model does not tell: its GPU by LOCAL_RANK, else the CPU.

    ACCELERATE_TORCH_DEVICE goes before: Ray Train says there which one is this worker's, where each has several, and
    all see those of the machine. Where one GPU is visible, it is this rank's: SLURM and Ray bind one to each task.
    ValueError where LOCAL_RANK is beyond several.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    told = torch.device(os.environ.get("ACCELERATE_TORCH_DEVICE", "cuda"))
    if told.type != "cuda" or told.index is not None:
        return told
    num_visible = torch.cuda.device_count()
    index = int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())) if num_visible > 1 else 0
    if index >= num_visible:
        raise ValueError(
            f"LOCAL_RANK is {index} and {num_visible} GPUs are visible: start at most {num_visible} processes on this "
            "machine, or show each of them its own GPU by CUDA_VISIBLE_DEVICES"
        )
    return torch.device("cuda", index)


def target(model: nn.Module, mesh: DeviceMesh | None) -> torch.device:
    """Where a model trains: where its tensors lie if that is a GPU, else this rank's default.

    A mesh of the CPU, or a process group that has no NCCL, keeps a model of the CPU there. ValueError for a model on
    several GPUs, or on one whose process group has no NCCL.
    """
    kinds = {tensor.device for tensor in [*model.parameters(), *model.buffers()]}
    on_gpu = {device for device in kinds if device.type == "cuda"}
    if len(on_gpu) > 1:
        raise ValueError(f"the model lies on several GPUs {sorted(map(str, on_gpu))}: move it to one, or to the CPU")
    backends = _backends()
    if on_gpu:
        device = on_gpu.pop()
        if backends is not None and "nccl" not in backends:
            raise ValueError(
                f"the model lies on {device} and the process group was started with {backends!r}: start it with "
                '"nccl" or "cpu:gloo,cuda:nccl", or let zerolite.shard start it'
            )
        return device
    is_cpu_mesh = isinstance(mesh, DeviceMesh) and mesh.device_type == "cpu"
    if is_cpu_mesh or (backends is not None and "nccl" not in backends):
        return torch.device("cpu")
    return default()


def _backends() -> str | None:
    """What the world's process group was started with, as "cpu:gloo,cuda:nccl"; None without one of several ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return str(dist.get_backend_config())


def on_cpu(*tensors: torch.Tensor) -> bool:
    """Whether all tensors lie in host memory, where the host kernels can work on them."""
    return all(tensor.device.type == "cpu" for tensor in tensors)


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies where the Triton kernels can work on it."""
    return tensor.device.type == "cuda"


def timed_event() -> tuple[int, torch.cuda.Event] | None:
    """(number of the current stream, event at its present end whose time can be read), where a GPU is in use."""
    if not torch.cuda.is_initialized():
        return None
    stream = torch.cuda.current_stream()
    return stream.stream_id, stream.record_event(torch.cuda.Event(enable_timing=True))


def nvtx_range(label: str) -> contextlib.AbstractContextManager[object]:
    """Context that NVIDIA's profilers show by this label, where a GPU is in use."""
    return torch.cuda.nvtx.range(label) if torch.cuda.is_initialized() else contextlib.nullcontext()


def has_bus(device: torch.device) -> bool:
    """Whether values travel between this device's memory and the host's."""
    return device.type == "cuda"


def name_of(device: torch.device) -> str:
    """The GPU's name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
