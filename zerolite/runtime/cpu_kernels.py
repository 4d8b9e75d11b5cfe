"""The host kernels on tensors of this process: what steps on the CPU without offload, bit for bit as workers do."""

from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache

import torch
from zerolite_kernels import cpu
from zerolite_kernels.cpu import command as abi
from zerolite_kernels.cpu.command import NORM, PARTIAL_NUMEL, Command
from zerolite_kernels.cpu_worker import share

from zerolite.runtime.device import on_cpu

GRADIENT_DTYPES = {
    torch.float32: abi.FP32,
    torch.bfloat16: abi.BF16,
    torch.float16: abi.FP16,
    torch.float64: abi.FP64,
}
WORTH_A_THREAD_NUMEL = 64 * PARTIAL_NUMEL


def serves(*tensors: torch.Tensor) -> bool:
    """Whether the kernels were built and work on these tensors."""
    return _library() is not None and on_cpu(*tensors) and all(t.dtype in GRADIENT_DTYPES for t in tensors)


def address(tensor: torch.Tensor | None, position: int = 0) -> int:
    """Of a region's element 0, where `tensor` begins at element `position` of it; modulo 2**64 as addresses count."""
    return 0 if tensor is None else (tensor.data_ptr() - position * tensor.element_size()) % 2**64


def execute(command: Command) -> None:
    """Run a command whose addresses are pointers, on as many threads as torch has."""
    library = _library()
    first, last = command.first, command.last
    num_threads = min(torch.get_num_threads(), max(1, (last - first) // WORTH_A_THREAD_NUMEL))
    if num_threads == 1:
        _check(library.zl_execute(None, command, first, last))
        return
    cuts = [share(command.numel, index, num_threads) for index in range(num_threads)]
    parts = [(max(first, low), min(last, high)) for low, high in cuts]
    futures = [_threads().submit(library.zl_execute, None, command, *part) for part in parts if part[0] < part[1]]
    wait(futures)
    for future in futures:
        _check(future.result())


def sums(command: Command, width: int = 1) -> list[float]:
    """Run NORM or PREPARE; the entries of its partial blocks, `width` a block."""
    num_blocks = (command.last - 1) // PARTIAL_NUMEL - command.first // PARTIAL_NUMEL + 1
    entries = torch.empty(width * num_blocks, dtype=torch.float64)
    command.result = entries.data_ptr()
    execute(command)
    return entries.tolist()


def squares(tensor: torch.Tensor, position: int) -> list[float]:
    """fp64 sums of squares of the partial blocks of a 1D tensor that begins at element `position` of its region."""
    if tensor.numel() == 0:
        return []
    stop = position + tensor.numel()
    return sums(
        Command(
            op=NORM,
            numel=stop,
            first=position,
            last=stop,
            gradient=address(tensor, position),
            gradient_dtype=GRADIENT_DTYPES[tensor.dtype],
        )
    )


@cache
def _library():
    return cpu.load()


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="zerolite-step")


def _check(code: int) -> None:
    if code != 0:
        raise ValueError(f"the host kernels refused a command (code {code})")
