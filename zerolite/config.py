"""What a user decides, as frozen values: the dtypes of a run."""

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
        factors, growth interval). fp16 takes torch's defaults where None; other dtypes refuse one.
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
