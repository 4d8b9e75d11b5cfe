"""The only place that asks CUDA or CPU: streams and events with the same methods on both."""

import contextlib
import os

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh


class Cpu:
    """The test bed: one queue (the calling thread), so streams order nothing and events have always happened."""

    backend = "gloo"
    chunk_numel = 512 * 1024  # what a step works on at once; its scratch, 2 MiB of fp32, stays in a core's cache

    def __init__(self):
        self.device = torch.device("cpu")

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

    def pin(self, memory: torch.Tensor) -> None:
        """Lock host memory in place, so that copies from and to it run beside the host."""

    def unpin(self, memory: torch.Tensor) -> None:
        """Undo `pin`."""


class Cuda:
    """One CUDA device; collectives and copies run on streams of their own beside the compute stream."""

    backend = "nccl"
    chunk_numel = 16 * 1024 * 1024

    def __init__(self, index: int):
        self.device = torch.device("cuda", index)

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

    def pin(self, memory: torch.Tensor) -> None:
        with torch.cuda.device(self.device):
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)))

    def unpin(self, memory: torch.Tensor) -> None:
        torch.cuda.synchronize(self.device)
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())))


Device = Cpu | Cuda


def of(device: torch.device) -> Device:
    """The queue-and-memory value for a torch device."""
    if device.type == "cuda":
        return Cuda(device.index if device.index is not None else torch.cuda.current_device())
    if device.type == "cpu":
        return Cpu()
    raise ValueError(f"zerolite runs on CUDA and on the CPU, the model lies on {device}: move it to one of them")


def default() -> torch.device:
    """This rank's device where the model does not tell: its GPU by LOCAL_RANK, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))
    return torch.device("cpu")


def target(model: nn.Module, mesh: DeviceMesh | None) -> torch.device:
    """Where a model trains: where its tensors lie if that is a GPU, else this rank's default for the mesh.

    ValueError for a model on several GPUs.
    """
    kinds = {tensor.device for tensor in [*model.parameters(), *model.buffers()]}
    on_gpu = {device for device in kinds if device.type == "cuda"}
    if len(on_gpu) > 1:
        raise ValueError(f"the model lies on several GPUs {sorted(map(str, on_gpu))}: move it to one, or to the CPU")
    if on_gpu:
        return on_gpu.pop()
    if isinstance(mesh, DeviceMesh) and mesh.device_type == "cpu":
        return torch.device("cpu")
    return default()


def on_cpu(*tensors: torch.Tensor) -> bool:
    """Whether all tensors lie in host memory, where the host kernels can work on them."""
    return all(tensor.device.type == "cpu" for tensor in tensors)


def timed_event() -> tuple[int, torch.cuda.Event] | None:
    """(number of the current stream, event at its present end whose time can be read), where a GPU is in use."""
    if not torch.cuda.is_initialized():
        return None
    stream = torch.cuda.current_stream()
    return stream.stream_id, stream.record_event(torch.cuda.Event(enable_timing=True))


def nvtx_range(label: str) -> contextlib.AbstractContextManager[object]:
    """Context that NVIDIA's profilers show by this label, where a GPU is in use."""
    return torch.cuda.nvtx.range(label) if torch.cuda.is_initialized() else contextlib.nullcontext()
