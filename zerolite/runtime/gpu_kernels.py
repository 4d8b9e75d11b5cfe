"""The kernels for a GPU on tensors of this process: what the host kernels compute, bit for bit."""

import importlib
from functools import cache
from importlib.util import find_spec

import torch

from zerolite.runtime.device import on_gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def serves(tensor: torch.Tensor) -> bool:
    """Whether Triton is installed and the kernels work on this tensor."""
    return on_gpu(tensor) and tensor.dtype in DTYPES and tensor.is_contiguous() and _has_triton()


def sum_of_squares(tensor: torch.Tensor, position: int) -> torch.Tensor:
    """0-dim fp64, on the tensor's GPU, of a 1D tensor that begins at element `position` of its region."""
    return importlib.import_module("zerolite_kernels.norm.triton_kernels").sum_of_squares(tensor, position)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
