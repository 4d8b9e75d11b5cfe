"""What a user decides, as frozen values: the dtypes of a run, and what leaves the device."""

import re
from dataclasses import dataclass

import torch

LOW_PRECISION = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Precision:
    """Dtypes of parameters and of the gradient reduction.

    param: dtype that modules compute in. Trainable parameters of 16 bits are stepped on an fp32 master copy.
    reduce: dtype that gradients are summed over ranks in, and kept in until the step.
        16 bytes a parameter (2 + 2 + 12) hold with `reduce=torch.bfloat16`; fp32 keeps 2 bytes more of gradient.
    scaler: rules of dynamic loss scaling, read from a `torch.amp.GradScaler` (initial scale, growth and back-off
        factors, growth interval). fp16 has torch's defaults where None; other dtypes refuse one.

    Raises TypeError for what is no floating dtype or no GradScaler, ValueError for a scaler without fp16.
    """

    param: torch.dtype = torch.bfloat16
    reduce: torch.dtype = torch.float32
    scaler: torch.amp.GradScaler | None = None

    def __post_init__(self):
        for role in ("param", "reduce"):
            dtype = getattr(self, role)
            if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
                raise TypeError(f"Precision({role}=...) takes a floating torch.dtype, got {dtype!r}")
        if self.scaler is not None and not isinstance(self.scaler, torch.amp.GradScaler):
            raise TypeError(
                "Precision(scaler=...) takes a torch.amp.GradScaler whose rules are followed, "
                f"got {type(self.scaler).__name__}"
            )
        if self.scaler is not None and self.param is not torch.float16:
            raise ValueError(f"loss scaling is for param=torch.float16, got param={self.param}: drop scaler=")


def reduce_dtype(precision: Precision | None, param_dtype: torch.dtype) -> torch.dtype:
    """Dtype of the gradient reduction; without a Precision, fp32 for 16-bit parameters and else their own."""
    if precision is not None:
        return precision.reduce
    return torch.float32 if param_dtype in LOW_PRECISION else param_dtype


def master_dtype(param_dtype: torch.dtype) -> torch.dtype:
    """Dtype that the optimizer steps in: fp32 for 16-bit parameters, else the parameter's own."""
    return torch.float32 if param_dtype in LOW_PRECISION else param_dtype


STATES = ("fp32", "bf16", "int8")
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


@dataclass(frozen=True)
class Offload:
    """What lies in host memory and who steps it there; `offload="cpu"` is `Offload()`.

    optimizer: gradients, master parameters and optimizer states; worker processes step them.
    parameters: at stage 3 also the parameters, so that the device holds two units at a time.
    budget: device bytes, an int or such as "20GiB", that model states may take on each rank; units stay on the device,
        first ones first, while they fit (with the two fp32 states of AdamW). None: everything goes to the host.
    workers, threads: optimizer processes a rank, and threads of each, a core a thread. None: one worker, with this
        rank's share of the cores that the process may run on.
    states: how moments are kept: "fp32", "bf16" (stochastic rounding), "int8" (blocks of 128 with an fp32 scale).
    path: a folder on a local NVMe drive that the moments lie on instead of in memory; nothing stays in it.

    Raises ValueError for a value that a field does not have, and for parameters=True together with a budget.
    """

    optimizer: bool = True
    parameters: bool = False
    budget: int | str | None = None
    workers: int | None = None
    threads: int | None = None
    states: str = "fp32"
    path: str | None = None

    def __post_init__(self):
        if not self.optimizer:
            raise ValueError(
                "Offload(optimizer=False) is not supported: parameters can leave the device only with their optimizer "
                "states; use Offload(parameters=True), or offload=None"
            )
        if self.states not in STATES:
            raise ValueError(f"Offload(states=...) is one of {', '.join(STATES)}; got {self.states!r}")
        for name in ("workers", "threads"):
            count = getattr(self, name)
            if count is not None and not (isinstance(count, int) and count >= 1):
                raise ValueError(f"Offload({name}=...) is a number of at least 1, or None; got {count!r}")
        if self.parameters and self.budget is not None:
            raise ValueError("Offload takes parameters=True or budget=, not both: with parameters=True all units leave")
        if self.budget is not None:
            parse_bytes(self.budget)

    @classmethod
    def of(cls, offload: "Offload | str | None") -> "Offload | None":
        if offload is None or isinstance(offload, Offload):
            return offload
        if offload == "cpu":
            return cls()
        raise ValueError(f'offload= takes "cpu", a zerolite.Offload or None, got {offload!r}')


def parse_bytes(size: int | str) -> int:
    """Bytes in 1024, "512MiB", "20 GB"."""
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", size.lower() if isinstance(size, str) else "")
    if match is None or match[2] not in _UNITS:
        raise ValueError(f'a number of bytes is an int or such as "20GiB" or "512MiB", got {size!r}')
    return int(float(match[1]) * _UNITS[match[2]])
