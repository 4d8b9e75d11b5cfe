"""What a machine moves and computes a second: measured by measured_rates.py, told by `zerolite doctor`, read by plans.

Imports no torch.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Rates:
    """Bytes, floating-point operations and elements a second, of one device and its host. None: not measured.

    Host figures are of all cores that the process may run on, so ranks of one machine share them.
    """

    device: str  # the GPU's name; "cpu" where there is none, and device figures are the host's
    matmul_flop_per_s: dict[str, float] = field(default_factory=dict)  # by dtype, as "bf16"; a multiply-add is two
    device_copy_bytes_per_s: float | None = None  # copied: each byte is read once and written once
    host_copy_bytes_per_s: float | None = None  # likewise
    host_step_elements_per_s: float | None = None  # AdamW in fp32 by the C++ kernels
    h2d_bytes_per_s: float | None = None  # of pinned memory
    d2h_bytes_per_s: float | None = None
    all_reduce_bytes_per_s: float | None = None  # over the bus: 2 (N - 1) / N of the buffer, on each of N ranks
    num_ranks: int = 1  # of the all-reduce

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Rates":
        """Rates from what `as_json` gave. ValueError names an entry that is unknown, absent or no rate."""
        names = {entry.name for entry in dataclasses.fields(cls)}
        for name in (*(set(values) - names), *({"device"} - set(values))):
            raise ValueError(
                f"rates: {name!r} is {'unknown' if name in values else 'absent'}; they have {sorted(names)}"
            )
        for name, value in values.items():
            rates = value.values() if name == "matmul_flop_per_s" and isinstance(value, Mapping) else [value]
            if name == "device":
                if not isinstance(value, str):
                    raise ValueError(f"rates: device is a name, got {value!r}")
            elif not all(rate is None or _is_rate(rate) for rate in rates):
                raise ValueError(f"rates: {name} is a positive number, got {value!r}")
        return cls(**values)


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
