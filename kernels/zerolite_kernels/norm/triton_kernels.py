"""The sum of squares of a gradient on a GPU: the bits of the host kernels' NORM and of `math.fsum` over its entries.

    entries   an fp64 sum for each PARTIAL_NUMEL elements, on a grid from the region's start. Element i is added to
              column i mod COLUMNS, row after row, and columns are added by halves: cpu/walk.h, `SquareSum`. Squares of
              fp32 and narrower numbers are exact in fp64, so a fused multiply-add changes nothing.
    total     their sum in pairs of fp64, 106 bits, rounded once. `fsum` is exact; they differ where a sum of n entries
              lies within n * 2**-106 of the middle of two fp64 numbers, a chance of about n * 2**-53.

Two launches whatever the length; the gradient is read once. Triton 3.6 to 3.9; imported only where it is used.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zerolite_kernels.cpu.command import PARTIAL_NUMEL
from zerolite_kernels.current_gpu import on_its_device

COLUMNS = 32
BLOCKS = 8  # entries that a program computes
UNROLL = 4  # rows whose loads are under way at once
WIDTH = 1024  # sums that the second launch keeps at once


@triton.jit(do_not_specialize=["first", "numel"])
def entries_kernel(
    x, entries, first, numel, num_entries,
    BLOCKS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """x (numel,) begins at element `first` of the first entry's ROWS * COLUMNS elements -> entries (num_entries,)."""
    blocks = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    index = blocks.to(tl.int64)[:, None] * (ROWS * COLUMNS) - first + tl.arange(0, COLUMNS)[None, :]
    sums = tl.zeros((BLOCKS, COLUMNS), tl.float64)
    for row in range(0, ROWS, UNROLL):
        for more in tl.static_range(UNROLL):
            i = index + (row + more) * COLUMNS
            values = tl.load(x + i, mask=(i >= 0) & (i < numel), other=0.0).to(tl.float64)
            sums += values * values
    for halving in tl.static_range(1, 6):
        sums = tl.sum(tl.reshape(sums, (BLOCKS, 2, COLUMNS >> halving)), axis=1)
    tl.store(entries + blocks, tl.reshape(sums, (BLOCKS,)), mask=blocks < num_entries)


@triton.jit
def _add_pairs(high, low, other_high, other_low):
    """The sum of two pairs, each high + low (Dekker 1971): `high` to the nearest, what that loses in `low`."""
    total = high + other_high
    moved = total - high
    error = (high - (total - moved)) + (other_high - moved) + (low + other_low)
    result = total + error
    return result, error - (result - total)


@triton.jit(do_not_specialize=["num_entries"])
def total_kernel(entries, result, num_entries, WIDTH: tl.constexpr):
    """entries (num_entries,) -> result (), rounded once; Inf or NaN where one of them is."""
    high = tl.zeros((WIDTH,), tl.float64)
    low = tl.zeros((WIDTH,), tl.float64)
    plain = tl.zeros((WIDTH,), tl.float64)
    for begin in range(0, num_entries, WIDTH):
        i = begin + tl.arange(0, WIDTH)
        values = tl.load(entries + i, mask=i < num_entries, other=0.0)
        high, low = _add_pairs(high, low, values, tl.zeros_like(values))
        plain += values
    high, low = tl.reduce((high, low), 0, _add_pairs)
    rough = tl.sum(plain, 0)
    tl.store(result, tl.where(rough - rough == 0.0, high + low, rough))


@on_its_device
def sum_of_squares(x: Tensor, position: int) -> Tensor:
    """() fp64: of x (n,), fp32, bf16 or fp16, which begins at element `position` of its region."""
    result = torch.zeros((), dtype=torch.float64, device=x.device)
    if x.numel() == 0:
        return result
    first = position % PARTIAL_NUMEL
    num_entries = triton.cdiv(first + x.numel(), PARTIAL_NUMEL)
    entries = torch.empty(num_entries, dtype=torch.float64, device=x.device)
    entries_kernel[(triton.cdiv(num_entries, BLOCKS),)](
        x, entries, first, x.numel(), num_entries,
        BLOCKS=BLOCKS, COLUMNS=COLUMNS, ROWS=PARTIAL_NUMEL // COLUMNS, UNROLL=UNROLL,
    )  # fmt: skip
    total_kernel[(1,)](entries, result, num_entries, WIDTH=WIDTH)
    return result
