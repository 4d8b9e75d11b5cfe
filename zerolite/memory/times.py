"""Seconds of a step from rates: what computes, what is sent, what the host does, and what hides behind what.

[Note: what is assumed]
Forward and backward are bound by matrix products. Reductions and gathers run beside them, and so do copies to and from
the host; each takes the longer of the two. The step of shards on the device reads and writes each byte of state once.
Workers step at the host's rate, shared by the ranks of a host, behind the next forward: a third of the computation.
Where the device is the host's CPU, the same cores do all of it, the step of shards at the workers' rate: nothing hides.
"""

from dataclasses import dataclass, fields, replace

import torch

from zerolite.memory.dry_engine import Traffic
from zerolite.memory.rates import Rates

# A card of the A100 or RTX 4090 class on PCIe 4, eight of them in a host. Not measured: `zerolite doctor` measures.
ASSUMED = Rates(
    device="a card of the A100 or RTX 4090 class",
    matmul_flop_per_s={"bf16": 120e12, "fp16": 120e12, "fp32": 40e12},
    device_copy_bytes_per_s=0.45e12,
    host_copy_bytes_per_s=50e9,
    host_step_elements_per_s=3.5e9,
    h2d_bytes_per_s=20e9,
    d2h_bytes_per_s=20e9,
    all_reduce_bytes_per_s=20e9,
    num_ranks=8,
)
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class StepTime:
    """Seconds, each as if it ran alone, and of the whole step with what hides behind what."""

    compute_seconds: float
    link_seconds: float
    bus_seconds: float
    device_step_seconds: float
    host_step_seconds: float
    total_seconds: float


def completed(rates: Rates | None) -> tuple[Rates, str]:
    """Rates in which what was not measured is assumed, and a text that says what is what."""
    if rates is None:
        return ASSUMED, f"rates of {ASSUMED.device}, 20 GB/s between ranks and to the host (assumed, not measured)"
    missing = [entry.name for entry in fields(rates) if getattr(rates, entry.name) in (None, {})]
    whole = replace(rates, **{name: getattr(ASSUMED, name) for name in missing})
    said = f"rates measured on {rates.device}"
    return whole, said + (f", but for {', '.join(missing)}, which are assumed" if missing else "")


@dataclass(frozen=True)
class Work:
    """What one rank does in a step."""

    flops: int  # of forward and backward
    dtype: torch.dtype  # of the parameters
    traffic: Traffic
    states_bytes: int  # that a step on the device reads, and writes
    stepped_numel: int  # elements that it steps there
    worker_numel: int  # elements that its workers step
    num_here: int  # ranks of a host


def step_time(work: Work, rates: Rates, is_host: bool) -> StepTime:
    """See [Note: what is assumed]. rates: of `completed`. is_host: the device is the host's CPU."""
    matmul, traffic = rates.matmul_flop_per_s, work.traffic
    compute = work.flops / matmul.get(_NAMES.get(work.dtype, "fp32"), min(matmul.values()))
    link = traffic.sent_bytes / _rate(rates.all_reduce_bytes_per_s)
    host_step = work.worker_numel * work.num_here / _rate(rates.host_step_elements_per_s)
    if is_host:
        bus = traffic.bus_bytes / _rate(rates.host_copy_bytes_per_s)
        device_step = work.stepped_numel * work.num_here / _rate(rates.host_step_elements_per_s)
        return StepTime(compute, link, bus, device_step, host_step, compute + link + bus + device_step + host_step)
    to_host = traffic.to_host_bytes / _rate(rates.d2h_bytes_per_s)
    bus = max(to_host, traffic.to_device_bytes / _rate(rates.h2d_bytes_per_s))
    device_step = work.states_bytes / _rate(rates.device_copy_bytes_per_s)
    longest = max(compute, link, bus)
    total = longest + device_step + max(0.0, host_step - longest / 3)
    return StepTime(compute, link, bus, device_step, host_step, total)


def _rate(rate: float | None) -> float:
    assert rate is not None, "rates are of `completed`"
    return rate
