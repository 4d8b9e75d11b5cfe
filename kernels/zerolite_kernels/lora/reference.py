"""LoRA's operations in plain torch: the truth for tests and benchmarks, and what serves where triton does not run.

Each function computes on the device of its tensors, and in their dtype. For the projections i that share x, with keep_i
in {0, 1} of bit-packed masks, p the dropout:

    S_i  = (keep_i * x / (1 - p)) A_i^T
    y_i  = x W_i^T + b_i + scale * S_i B_i^T                  (in linears.py: these products are no kernel's business)
    dS_i = scale * dy_i B_i,  dB_i = scale * dy_i^T S_i
    dA_i = dS_i^T (keep_i * x / (1 - p))
    dx   = sum_i dy_i W_i + sum_i keep_i * (dS_i A_i) / (1 - p)

The division by 1 - p is made on results: elements of x are kept or dropped, never rounded.

[Note: chunks] With dropout, rows are taken in chunks, so that masks and masked rows live in the cache only, and sums
over rows are sums of short sums, which round less. Chunks of halves are computed in fp32: many CPUs have no fast
product in bf16.

[Note: one product] Without dropout a GPU takes one product with the A's side by side, which reads x once. The CPU takes
one for each projection: MKL's wide ones, and its sums onto a result, have up to 1.5 times the error of PEFT's products.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_NUMEL, CHUNK_ROWS = 1 << 18, 512  # of x at a time, at most: see [Note: chunks]
GATHER_BITS = 0x0102040810204080  # times eight bytes of 0 or 1, in its upper byte: their bits, the first one lowest

# --- masks -----------------------------------------------------------------------------------------------------------


def dropout_threshold(dropout: float) -> int:
    """An element is kept where its random number in [0, 2^16) is at least this."""
    return round(dropout * (1 << 16))


def draw_keep(rows: int, width: int, dropout: float, generator: torch.Generator) -> Tensor:
    """(rows, width) uint8, 1 with probability 1 - dropout (to 2^-16), else 0; width is a multiple of 8."""
    words = torch.empty(rows, width // 4, dtype=torch.int64, device=generator.device)
    numbers = words.random_(-(1 << 63), None, generator=generator).view(torch.int16)
    threshold = dropout_threshold(dropout) - (1 << 15)  # as the numbers are in [-2^15, 2^15)
    if threshold == 1 << 15:  # a number that is none of int16
        return torch.zeros_like(numbers, dtype=torch.uint8)
    return numbers.ge_(threshold).to(torch.uint8)


def pack_bits(keep: Tensor) -> Tensor:
    """(..., K) uint8 of 0 and 1, contiguous, K a multiple of 8 -> (..., K / 8) uint8, bit j of each for element j."""
    return ((keep.view(torch.int64) * GATHER_BITS) >> 56).to(torch.uint8)


def unpack_bits(bits: Tensor, width: int) -> Tensor:
    """(..., ceil(width / 8)) uint8 -> (..., width) uint8 of 0 and 1."""
    keep = unpacked_bytes(bits.device).index_select(0, bits.flatten().int()).view(torch.uint8)
    return keep.view(*bits.shape[:-1], 8 * bits.shape[-1])[..., :width]


_UNPACKED: dict[torch.device, Tensor] = {}  # what `unpacked_bytes` has made, fake tensors apart


def unpacked_bytes(device: torch.device) -> Tensor:
    """(256,) int64: the eight bytes of 0 and 1 that a byte's bits unpack to."""
    if device in _UNPACKED:
        return _UNPACKED[device]
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    table = bits.to(torch.uint8).view(torch.int64).flatten()
    if type(table) is Tensor:
        _UNPACKED[device] = table
    return table


def row_chunks(x: Tensor) -> Iterator[slice]:
    """Chunks of the rows of x (M, K): see [Note: chunks]."""
    step = max(1, min(CHUNK_ROWS, CHUNK_NUMEL // x.shape[1]))
    return (slice(begin, min(begin + step, len(x))) for begin in range(0, len(x), step))


# --- LoRA ------------------------------------------------------------------------------------------------------------


def lora_xa(x: Tensor, A: Tensor, dropout: float, seed: int) -> tuple[Tensor, Tensor | None]:
    """x (M, K), A (n, r, K) -> S (n, M, r) and the masks' bits (n, M, ceil(K / 8)), None without dropout."""
    (M, K), (n, r, _) = x.shape, A.shape
    S = x.new_empty(M, n, r).transpose(0, 1)  # in memory, the projections' columns lie side by side
    if dropout == 0:
        for S_part, A_part in operands(S, A):
            torch.mm(x, A_part.t(), out=S_part)
        return S, None
    num_bytes = -(-K // 8)
    bits = torch.empty(n, M, num_bytes, dtype=torch.uint8, device=x.device)
    generator = torch.Generator(x.device).manual_seed(seed)
    A = A.to(wide_dtype(x))
    for rows in row_chunks(x):
        part = x[rows].to(A.dtype)
        for i in range(n):
            keep = draw_keep(len(part), 8 * num_bytes, dropout, generator)
            bits[i, rows] = pack_bits(keep)
            S[i, rows] = torch.mm(keep[:, :K].to(A.dtype).mul_(part), A[i].t()).mul_(1 / (1 - dropout))
    return S, bits


def lora_db_ds(dy: Tensor, S: Tensor, B: Tensor, scale: float, dS: Tensor, dtype: torch.dtype) -> Tensor:
    """dy (M, N), S (M, r), B (N, r) -> dB (N, r) in `dtype`; dS (M, r) is written."""
    dS.addmm_(dy, B, beta=0, alpha=scale)
    return torch.empty_like(B).addmm_(dy.t(), S, beta=0, alpha=scale).to(dtype)


def lora_da(dS: Tensor, x: Tensor, bits: Tensor | None, dropout: float, dtype: torch.dtype) -> Tensor:
    """dS (n, M, r), x (M, K) -> dA (n, r, K) in `dtype`."""
    (n, _, r), K = dS.shape, x.shape[1]
    if bits is None:
        dA = x.new_empty(n, r, K)
        for dS_part, dA_part in operands(dS, dA):
            torch.mm(dS_part.t(), x, out=dA_part)
        return dA.to(dtype)
    dA = x.new_zeros(n, r, K, dtype=wide_dtype(x))
    dS = dS.to(dA.dtype)
    for rows in row_chunks(x):
        part = x[rows].to(dA.dtype)
        for i in range(n):
            dA[i] += torch.mm(dS[i, rows].t(), unpack_bits(bits[i, rows], K).to(dA.dtype).mul_(part))
    return dA.mul_(1 / (1 - dropout)).to(dtype)


def lora_dx_(dx: Tensor, dS: Tensor, A: Tensor, bits: Tensor | None, dropout: float) -> None:
    """dx (M, K) += dS (n, M, r) times A (n, r, K), where kept."""
    n, _, K = A.shape
    if bits is None:
        for dS_part, A_part in operands(dS, A):
            add_product_(dx, dS_part, A_part)
        return
    dS, A, keep_scale = dS.to(wide_dtype(dx)), A.to(wide_dtype(dx)), 1 / (1 - dropout)
    for rows in row_chunks(dx):
        part = dx[rows]
        total = part.to(A.dtype)
        for i in range(n):
            keep = unpack_bits(bits[i, rows], K).to(A.dtype)
            total.addcmul_(torch.mm(dS[i, rows], A[i]), keep, value=keep_scale)
        if total is not part:
            part.copy_(total)


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right. MKL would add term by term onto the total, and round each: see [Note: one product]."""
    if total.device.type == "cpu":
        total += torch.mm(left, right)
    else:
        total.addmm_(left, right)


def operands(S: Tensor, A: Tensor) -> list[tuple[Tensor, Tensor]]:
    """S (n, M, r) and A (n, r, K) as the views (M, c), (c, K) of the products to make: see [Note: one product]."""
    if S.device.type == "cpu":
        return list(zip(S, A, strict=True))
    n, r, K = A.shape
    return [(S.transpose(0, 1).view(-1, n * r), A.view(n * r, K))]


def wide_dtype(x: Tensor) -> torch.dtype:
    """What chunks are computed in: fp32 for halves."""
    return torch.promote_types(x.dtype, torch.float32)
