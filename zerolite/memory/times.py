"""Seconds of a step from rates: what computes, what is sent, what the host does, and what hides behind what.

[Note: what is assumed]
Forward and backward are bound by matrix products. Reductions and gathers run beside them, and so do copies to and from
the host; each takes the longer of the two. The step of shards on the device reads and writes each byte of state once.
Workers step at the host's memory bandwidth, shared by the ranks of a host, behind the next forward.
"""

from dataclasses import dataclass

from zerolite.memory.dry_engine import Traffic


@dataclass(frozen=True)
class AssumedRates:
    """Of one rank, as numbers a second. Defaults: a card of the A100 or RTX 4090 class on PCIe 4; not measured.

    `zerolite doctor` measures a machine's.
    """

    matrix_flops: float = 120e12  # 16-bit matrix products as models reach them, about 40 % of the data sheet
    memory_bytes: float = 1.0e12  # device memory, read and written
    link_bytes: float = 20e9  # between ranks, each way
    bus_bytes: float = 20e9  # between device and host, each way
    host_memory_bytes: float = 100e9  # of a whole host, read and written

    @property
    def assumptions(self) -> str:
        return (
            f"{self.matrix_flops / 1e12:.0f} TFLOP/s, device memory {self.memory_bytes / 1e9:.0f} GB/s, links "
            f"{self.link_bytes / 1e9:.0f} GB/s, bus {self.bus_bytes / 1e9:.0f} GB/s, host memory "
            f"{self.host_memory_bytes / 1e9:.0f} GB/s"
        )


@dataclass(frozen=True)
class StepTime:
    """Seconds, each as if it ran alone, and of the whole step with what hides behind what."""

    compute_seconds: float
    link_seconds: float
    bus_seconds: float
    device_step_seconds: float
    host_step_seconds: float
    total_seconds: float


def step_time(
    flops: int, traffic: Traffic, device_step_bytes: int, host_step_bytes: int, rates: AssumedRates
) -> StepTime:
    """See [Note: what is assumed]. flops: of forward and backward; host_step_bytes: of all ranks of a host."""
    compute = flops / rates.matrix_flops
    link = traffic.sent_bytes / rates.link_bytes
    bus = max(traffic.to_host_bytes, traffic.to_device_bytes) / rates.bus_bytes
    device_step = device_step_bytes / rates.memory_bytes
    host_step = host_step_bytes / rates.host_memory_bytes
    hidden = max(compute, link, bus) / 3  # the forward's part, behind which workers step
    total = max(compute, link, bus) + device_step + max(0.0, host_step - hidden)
    return StepTime(compute, link, bus, device_step, host_step, total)
