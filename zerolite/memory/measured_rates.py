"""Measure `Rates` on this machine: copies, matrix products, the host's optimizer step, an all-reduce under torchrun."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from zerolite_kernels.cpu.command import ADAMW, FP32, STEP, Command

from zerolite.memory.rates import Rates
from zerolite.runtime import cpu_kernels
from zerolite.runtime import device as devices
from zerolite.runtime.device import Device

MATMUL_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COPY_BYTES = 32 << 20  # beyond the caches of a core
STEP_NUMEL = 2 << 20
MAX_WIDTH = 8192  # of a square matrix


def measure_rates(seconds: float) -> Rates:
    """Each rate from repetitions of about `seconds`, the best of which counts. Collective under torchrun.

    Where torchrun has started several ranks their all-reduce is measured too; host figures are then taken by all ranks
    at once, each with its share of the cores; that of the step is of all ranks of the machine together.
    """
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = devices.of(devices.default())
    device.select()
    cpu = devices.of(torch.device("cpu"))
    with _threads(max(1, len(os.sched_getaffinity(0)) // num_local)), torch.no_grad():
        buffer = torch.zeros(COPY_BYTES, dtype=torch.uint8)
        of_host = _copy(cpu, torch.empty_like(buffer), buffer, seconds)
        h2d, d2h = _bus(device, buffer, seconds)
        return Rates(
            device=devices.name_of(device.device),
            matmul_flop_per_s={name: _matmul(device, dtype, seconds) for name, dtype in MATMUL_DTYPES.items()},
            device_copy_bytes_per_s=_device_copy(device, seconds) if h2d is not None else of_host,
            host_copy_bytes_per_s=of_host,
            host_step_elements_per_s=_host_step(cpu, seconds, num_local),
            h2d_bytes_per_s=h2d,
            d2h_bytes_per_s=d2h,
            all_reduce_bytes_per_s=_all_reduce(device, seconds) if num_ranks > 1 else None,
            num_ranks=num_ranks,
        )


def slowest_rates(seconds: float) -> Rates:
    """As `measure_rates`, of the slowest rank, the same on every rank. Collective where there is a process group."""
    rates = measure_rates(seconds)
    if not dist.is_initialized():
        return rates
    from zerolite.runtime.mesh import mesh_of  # as below

    group = mesh_of(None, devices.default()).shard
    names = [entry.name for entry in dataclasses.fields(rates) if isinstance(getattr(rates, entry.name), float)]
    products = list(rates.matmul_flop_per_s)
    own = [*rates.matmul_flop_per_s.values(), *(getattr(rates, name) for name in names)]
    least = (
        group.all_gather_scalars(torch.tensor(own, dtype=torch.float64, device=devices.default()))
        .min(dim=0)
        .values.tolist()
    )
    matmul = dict(zip(products, least, strict=False))
    return dataclasses.replace(rates, matmul_flop_per_s=matmul, **dict(zip(names, least[len(products) :], strict=True)))


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Inside, torch has so many threads on the host, whatever OMP_NUM_THREADS says."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _best_s(device: Device, work: Callable[[], object], seconds: float) -> float:
    """The shortest time of one call of `work`, of three at least; each ends when the device has done it."""
    best, end, count = float("inf"), time.perf_counter() + seconds, 0
    while count < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        device.synchronize(device.record())
        best = min(best, time.perf_counter() - start)
        count += 1
    return best


def _copy(device: Device, target: torch.Tensor, source: torch.Tensor, seconds: float) -> float:
    device.copy(target, source)
    device.synchronize(device.record())
    return source.nbytes / _best_s(device, lambda: device.copy(target, source), seconds)


def _device_copy(device: Device, seconds: float) -> float:
    source = torch.zeros(8 * COPY_BYTES, dtype=torch.uint8, device=device.device)
    return _copy(device, torch.empty_like(source), source, seconds)


def _bus(device: Device, memory: torch.Tensor, seconds: float) -> tuple[float | None, float | None]:
    """(H2D, D2H) of pinned memory; None where there is no bus."""
    if not devices.has_bus(device.device):
        return None, None
    is_pinned = device.pin(memory)
    try:
        there = torch.empty_like(memory, device=device.device)
        return _copy(device, there, memory, seconds), _copy(device, memory, there, seconds)
    finally:
        if is_pinned:
            device.unpin([memory])


def _matmul(device: Device, dtype: torch.dtype, seconds: float) -> float:
    """Of square matrices that are large enough for one product to take a third of `seconds`."""
    width = 256
    while True:
        left = torch.ones(width, width, dtype=dtype, device=device.device)
        product_s = _once_s(device, left)
        if 8 * product_s > seconds / 3 or width >= MAX_WIDTH:
            return 2 * width**3 / min(product_s, _best_s(device, partial(torch.matmul, left, left), seconds))
        width *= 2


def _once_s(device: Device, left: torch.Tensor) -> float:
    _ = left @ left  # libraries are loaded, and kernels chosen
    device.synchronize(device.record())
    start = time.perf_counter()
    _ = left @ left
    device.synchronize(device.record())
    return time.perf_counter() - start


def _host_step(cpu: Device, seconds: float, num_local: int) -> float | None:
    """Of all ranks of this machine together; None where the C++ kernels are not built."""
    tensors = {name: torch.zeros(STEP_NUMEL) for name in ("parameter", "gradient", "exp_avg", "exp_avg_sq")}
    if not cpu_kernels.serves(*tensors.values()):
        return None
    command = Command(
        op=STEP, rule=ADAMW, gradient_dtype=FP32, numel=STEP_NUMEL, first=0, last=STEP_NUMEL, multiplier=1.0, lr=1e-3,
        beta1=0.9, beta2=0.999, eps=1e-8, bias_correction1=0.1, bias_correction2_sqrt=0.03, trust_ratio=1.0,
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
    )  # fmt: skip
    return num_local * STEP_NUMEL / _best_s(cpu, lambda: cpu_kernels.execute(command), seconds)


def _all_reduce(device: Device, seconds: float) -> float:
    """Bytes over the bus. Collective; every rank runs as many repetitions."""
    from zerolite.runtime.mesh import mesh_of  # imports as much again as torch

    mesh_of(None, device.device)
    buffer = torch.zeros(COPY_BYTES // 4, device=device.device)
    times = []
    for _ in range(max(4, int(seconds / 0.02))):
        start = time.perf_counter()
        dist.all_reduce(buffer)
        device.synchronize(device.record())
        times.append(time.perf_counter() - start)
    world_size = dist.get_world_size()
    return buffer.nbytes * 2 * (world_size - 1) / world_size / min(times[1:])
