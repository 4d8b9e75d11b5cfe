"""Sums of squares in fp64, the terms of a gradient's norm."""

import math

import torch

from zerolite.runtime import cpu_kernels, gpu_kernels

ROW_NUMEL = 1024
CHUNK_NUMEL = 1024 * ROW_NUMEL


def sum_of_squares(tensor: torch.Tensor, position: int = 0) -> torch.Tensor:
    """0-dim fp64 sum of squares of a 1D tensor, elements [position, ...) of a rank's shard of a bucket.

    The kernels of the CPU and of a GPU sum in fp64 throughout, with partial sums on a grid from the shard's start, as
    workers make them: the result does not depend on who computes it. Without kernels, fp32 within rows of 1024 elements
    and fp64 over rows: relative error 1e-9; where squares leave fp32's range (a result of Inf or 0)
    `exact_sum_of_squares` tells. An Inf or NaN stays one.
    """
    if tensor.is_meta:  # of a plan: it has no values
        return torch.zeros((), dtype=torch.float64, device=tensor.device)
    if cpu_kernels.serves(tensor):
        return torch.tensor(add_up(cpu_kernels.squares(tensor, position)), dtype=torch.float64)
    if gpu_kernels.serves(tensor):
        return gpu_kernels.sum_of_squares(tensor, position)
    if tensor.dtype == torch.float64:
        return exact_sum_of_squares(tensor)
    total = torch.zeros((), dtype=torch.float64, device=tensor.device)
    for start in range(0, tensor.numel(), CHUNK_NUMEL):
        chunk = tensor[start : start + CHUNK_NUMEL].to(torch.float32)
        whole = chunk.numel() // ROW_NUMEL * ROW_NUMEL
        rows = torch.linalg.vector_norm(chunk[:whole].view(-1, ROW_NUMEL), dim=1)
        total += rows.double().square().sum()
        total += torch.linalg.vector_norm(chunk[whole:]).double().square()
    return total


def exact_sum_of_squares(tensor: torch.Tensor, position: int = 0) -> torch.Tensor:
    """0-dim fp64 sum of squares, in fp64 throughout: beyond the range of no narrower dtype's squares."""
    if cpu_kernels.serves(tensor) or gpu_kernels.serves(tensor):
        return sum_of_squares(tensor, position)
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).square()


def add_up(terms: list[float]) -> float:
    """Their sum rounded once, in whatever order they come; Inf or NaN where one of them is."""
    try:
        return math.fsum(terms)
    except (OverflowError, ValueError):
        return sum(terms)
