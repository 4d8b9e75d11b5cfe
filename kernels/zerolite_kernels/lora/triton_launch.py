"""The functions of reference.py on a GPU: shapes, blocks and grids of the kernels in triton_kernels.py.

The bits are the same on every run: blocks and splits follow from shapes and dtypes alone (a table, no autotuning). A
rank is padded to at least 16 and, above `MAX_BLOCK_R`, tiled by a grid axis.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from zerolite_kernels.current_gpu import on_its_device
from zerolite_kernels.lora.reference import dropout_threshold
from zerolite_kernels.lora.triton_kernels import da_kernel, db_ds_kernel, dx_kernel, sum_kernel, xa_kernel

MAX_PROJECTIONS = 3  # of one launch, as accumulators are variables; more projections take more launches
MAX_BLOCK_R = 64
# The fewest that pass BigCrush: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011, section 4.
PHILOX_ROUNDS = 7
# A sum is split among programs until there are about this many, two for each SM of an H100, and none has less than
# MIN_SHARE rows or columns to add up: partial sums are written and read once more, so they stay few.
TARGET_PROGRAMS = 2 * 132
MIN_SHARE = 256
SUM_BLOCK = 1024

# Kernel, bytes of an element, whether the rank is wide (more than 32) -> rows, columns and warps of a program's tile.
BLOCKS = {
    ("xa", 2, False): (64, 64, 8),
    ("xa", 2, True): (64, 64, 8),
    ("xa", 4, False): (32, 16, 8),
    ("xa", 4, True): (32, 16, 8),
    ("db_ds", 2, False): (64, 256, 8),
    ("db_ds", 2, True): (64, 128, 8),
    ("db_ds", 4, False): (32, 64, 8),
    ("db_ds", 4, True): (32, 32, 8),
    ("da", 2, False): (64, 128, 8),
    ("da", 2, True): (64, 64, 8),
    ("da", 4, False): (32, 64, 4),
    ("da", 4, True): (32, 64, 8),
    ("dx", 2, False): (64, 128, 8),
    ("dx", 2, True): (64, 128, 8),
    ("dx", 4, False): (32, 64, 4),
    ("dx", 4, True): (32, 32, 8),
}


@on_its_device
def lora_xa(x: Tensor, A: Tensor, dropout: float, seed: int) -> tuple[Tensor, Tensor | None]:
    """x (M, K), A (n, r, K) -> S (n, M, r) and the masks' bits (n, M, ceil(K / 8)), None without dropout."""
    (M, K), (n, r, _) = x.shape, A.shape
    S = x.new_empty(M, n, r).transpose(0, 1)  # as in reference.py
    bits = torch.empty(n, M, -(-K // 8), dtype=torch.uint8, device=x.device) if dropout > 0 else None
    block_r, (block_m, block_k, num_warps) = rank_block(r), blocks("xa", x, r)
    row_tiles, rank_tiles = triton.cdiv(M, block_m), triton.cdiv(r, block_r)
    for part in parts(n):
        num = part.stop - part.start
        splits, columns = split(K, block_k, row_tiles * rank_tiles)
        target = S[part] if splits == 1 else S.new_empty(splits * num, M, r, dtype=torch.float32)
        xa_kernel[(row_tiles, splits, rank_tiles)](
            x, A[part], x if bits is None else bits[part], target, seed, dropout_threshold(dropout),
            1 / (1 - dropout), part.start, M, K, r, columns, *x.stride(), *target.stride()[:2],
            NUM=num, DROPOUT=dropout > 0, ROUNDS=PHILOX_ROUNDS,
            BLOCK_M=block_m, BLOCK_K=block_k, BLOCK_R=block_r, num_warps=num_warps,
        )  # fmt: skip
        if splits > 1:
            add_partials(target, S[part])
    return S, bits


@on_its_device
def lora_db_ds(dy: Tensor, S: Tensor, B: Tensor, scale: float, dS: Tensor, dtype: torch.dtype) -> Tensor:
    """dy (M, N), S (M, r), B (N, r) -> dB (N, r) in `dtype`; dS (M, r) is written."""
    (M, N), r = dy.shape, B.shape[1]
    dB = torch.empty(N, r, dtype=dtype, device=dy.device)
    block_r, (block_m, block_n, num_warps) = rank_block(r), blocks("db_ds", dy, r)
    column_tiles, rank_tiles = triton.cdiv(N, block_n), triton.cdiv(r, block_r)
    splits, rows = split(M, block_m, column_tiles * rank_tiles)
    dB_target = dB[None] if splits == 1 else dy.new_empty(splits, N, r, dtype=torch.float32)
    dS_target = dS[None] if column_tiles == 1 else dy.new_empty(column_tiles, M, r, dtype=torch.float32)
    db_ds_kernel[(column_tiles, splits, rank_tiles)](
        dy, S, B.contiguous(), dB_target, dS_target, scale, M, N, r, rows, *dy.stride(), S.stride(0),
        *dS_target.stride()[:2],
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_R=block_r, num_warps=num_warps,
    )  # fmt: skip
    if splits > 1:
        add_partials(dB_target, dB[None])
    if column_tiles > 1:
        add_partials(dS_target, dS[None])
    return dB


@on_its_device
def lora_da(dS: Tensor, x: Tensor, bits: Tensor | None, dropout: float, dtype: torch.dtype) -> Tensor:
    """dS (n, M, r), x (M, K) -> dA (n, r, K) in `dtype`."""
    (n, M, r), K = dS.shape, x.shape[1]
    dA = torch.empty(n, r, K, dtype=dtype, device=x.device)
    block_r, (block_m, block_k, num_warps) = rank_block(r), blocks("da", x, r)
    column_tiles, rank_tiles = triton.cdiv(K, block_k), triton.cdiv(r, block_r)
    splits, rows = split(M, block_m, column_tiles * rank_tiles)
    for part in parts(n):
        num = part.stop - part.start
        target = dA[part] if splits == 1 else x.new_empty(splits, num, r, K, dtype=torch.float32)
        da_kernel[(column_tiles, splits, rank_tiles)](
            dS[part], x, x if bits is None else bits[part], target, 1 / (1 - dropout), M, K, r, rows,
            *dS.stride()[:2], *x.stride(),
            NUM=num, DROPOUT=bits is not None,
            BLOCK_M=block_m, BLOCK_K=block_k, BLOCK_R=block_r, num_warps=num_warps,
        )  # fmt: skip
        if splits > 1:
            add_partials(target, dA[part])
    return dA


@on_its_device
def lora_dx_(dx: Tensor, dS: Tensor, A: Tensor, bits: Tensor | None, dropout: float) -> None:
    """dx (M, K), contiguous, += dS (n, M, r) times A (n, r, K), where kept."""
    (M, K), (n, r, _) = dx.shape, A.shape
    block_m, block_k, num_warps = blocks("dx", dx, r)
    for part in parts(n):
        dx_kernel[(triton.cdiv(M, block_m), triton.cdiv(K, block_k))](
            dx, dS[part], A[part], dx if bits is None else bits[part], 1 / (1 - dropout), M, K, r, *dS.stride()[:2],
            NUM=part.stop - part.start, DROPOUT=bits is not None,
            BLOCK_M=block_m, BLOCK_K=block_k, BLOCK_R=rank_block(r), num_warps=num_warps,
        )  # fmt: skip


def add_partials(partials: Tensor, result: Tensor) -> None:
    """Partial sums, contiguous, first to last -> result (n, M, r); its last dimension is contiguous."""
    n, M, r = result.shape
    sum_kernel[(triton.cdiv(result.numel(), SUM_BLOCK),)](
        partials, result, partials.numel() // result.numel(), result.numel(), M, r, *result.stride()[:2],
        BLOCK=SUM_BLOCK,
    )  # fmt: skip


def parts(n: int) -> list[slice]:
    """Projections, as many at a time as a launch takes."""
    return [slice(begin, min(begin + MAX_PROJECTIONS, n)) for begin in range(0, n, MAX_PROJECTIONS)]


def rank_block(r: int) -> int:
    """Columns of a tile along the rank: a power of two from 16, which is the least that a tensor core multiplies."""
    return min(MAX_BLOCK_R, max(16, triton.next_power_of_2(r)))


def blocks(kernel: str, x: Tensor, r: int) -> tuple[int, int, int]:
    """Rows, columns and warps of a program's tile."""
    return BLOCKS[kernel, x.element_size(), rank_block(r) == MAX_BLOCK_R]


def split(length: int, step: int, num_tiles: int) -> tuple[int, int]:
    """How many programs share a sum over `length`, and what each takes of it, a multiple of `step`."""
    wanted = triton.cdiv(TARGET_PROGRAMS, num_tiles)
    share = step * triton.cdiv(max(MIN_SHARE, triton.cdiv(length, wanted)), step)
    return triton.cdiv(length, share), share
