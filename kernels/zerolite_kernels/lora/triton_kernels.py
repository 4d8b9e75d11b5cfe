"""LoRA's memory-bound operations on a GPU, in Triton: the functions of reference.py with each large tensor read once.

Formula, for up to three projections i that share x, with keep_i in {0, 1} of the bit-packed masks, p the dropout:

    S_i  = (keep_i * x / (1 - p)) A_i^T                  x is read once; masks are drawn here and written as bits
    dS_i = scale * dy_i B_i,  dB_i = scale * dy_i^T S_i  dy_i is read once for both
    dA_i = dS_i^T (keep_i * x / (1 - p))                 x is read once, and each bit
    dx  += sum_i keep_i * (dS_i A_i) / (1 - p)           dx is read and written once

Products accumulate in fp32; fp32 inputs are multiplied as such, not as tf32. There are no atomics: programs that share
a result write fp32 partial sums, which `sum_kernel` adds in a fixed order. Offsets of rows are 64-bit.
triton_launch.py chooses blocks and grids. Triton 3.6 to 3.9; imported only where it is used.
"""

from __future__ import annotations

import triton
import triton.language as tl

# M is the number of tokens, another one each batch: a kernel is not compiled again for multiples of 16.

# --- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _draw(seed, threshold, columns, rows, projection, ROUNDS: tl.constexpr):
    """Bytes of a mask, one for each counter (column of bytes, row, projection, 0): eight 16-bit numbers, eight bits."""
    zero = columns[None, :] * 0 + rows[:, None] * 0
    words = tl.philox(seed, zero + columns[None, :], zero + rows[:, None], zero + projection, zero, ROUNDS)
    packed = zero
    for i in tl.static_range(4):
        low = (words[i] & 0xFFFF).to(tl.int32) >= threshold
        high = (words[i] >> 16).to(tl.int32) >= threshold
        packed |= (low.to(tl.int32) << (2 * i)) | (high.to(tl.int32) << (2 * i + 1))
    return packed.to(tl.uint8)


@triton.jit
def _unpack(packed):
    """(R, C) bytes -> (R, 8 C) booleans; bit j of a byte is its column j."""
    bits = (packed.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, (packed.shape[0], packed.shape[1] * 8)) != 0


@triton.jit
def _add_xa(acc, x, a, a_mask, bits, bits_mask, seed, threshold, columns, rows, projection,
    DROPOUT: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """acc + (keep * x) A^T, of one tile and one projection; the tile's bits are written."""
    if DROPOUT:
        packed = _draw(seed, threshold, columns, rows, projection, ROUNDS)
        tl.store(bits, packed, mask=bits_mask)
        x = tl.where(_unpack(packed), x, tl.zeros_like(x))
    return tl.dot(x, tl.load(a, mask=a_mask, other=0.0), acc, input_precision="ieee")


@triton.jit(do_not_specialize=["seed", "threshold"])
def xa_kernel(
    x, a, bits, s, seed, threshold, keep_scale, projection, M, K, r, columns_per_program, stride_xm, stride_xk,
    stride_sn, stride_sm,
    NUM: tl.constexpr, DROPOUT: tl.constexpr, ROUNDS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """x (M, K), a (NUM, r, K), bits (NUM, M, ceil(K / 8)) -> bits and partial s (column splits * NUM, M, r)."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    first = tl.program_id(1) * columns_per_program
    num_bytes = (K + 7) // 8
    num_written = tl.where(tl.program_id(2) == 0, num_bytes, 0)  # all tiles of the rank draw the same bits
    long_rows = rows.to(tl.int64)
    is_row = (rows < M)[:, None]
    plane = tl.cast(M, tl.int64) * num_bytes
    acc0 = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    acc1 = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    acc2 = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for begin in range(first, tl.minimum(K, first + columns_per_program), BLOCK_K):
        columns = begin + tl.arange(0, BLOCK_K)
        is_column = columns < K
        x_pointers = x + long_rows[:, None] * stride_xm + columns.to(tl.int64)[None, :] * stride_xk
        x_tile = tl.load(x_pointers, mask=is_row & is_column[None, :], other=0.0)
        a_tile = a + ranks[None, :] * K + columns[:, None]
        a_mask = is_column[:, None] & (ranks < r)[None, :]
        byte_columns = begin // 8 + tl.arange(0, BLOCK_K // 8)
        bits_tile = bits + long_rows[:, None] * num_bytes + byte_columns[None, :]
        bits_mask = is_row & (byte_columns < num_written)[None, :]
        acc0 = _add_xa(
            acc0, x_tile, a_tile, a_mask, bits_tile, bits_mask, seed, threshold, byte_columns, rows, projection,
            DROPOUT, ROUNDS,
        )  # fmt: skip
        if NUM > 1:
            acc1 = _add_xa(
                acc1, x_tile, a_tile + r * K, a_mask, bits_tile + plane, bits_mask, seed, threshold, byte_columns,
                rows, projection + 1, DROPOUT, ROUNDS,
            )  # fmt: skip
        if NUM > 2:
            acc2 = _add_xa(
                acc2, x_tile, a_tile + 2 * r * K, a_mask, bits_tile + 2 * plane, bits_mask, seed, threshold,
                byte_columns, rows, projection + 2, DROPOUT, ROUNDS,
            )  # fmt: skip
    s += tl.program_id(1).to(tl.int64) * NUM * stride_sn
    s_tile = s + long_rows[:, None] * stride_sm + ranks[None, :]
    s_mask = is_row & (ranks < r)[None, :]
    tl.store(s_tile, (acc0 * keep_scale).to(s.dtype.element_ty), mask=s_mask)
    if NUM > 1:
        tl.store(s_tile + stride_sn, (acc1 * keep_scale).to(s.dtype.element_ty), mask=s_mask)
    if NUM > 2:
        tl.store(s_tile + 2 * stride_sn, (acc2 * keep_scale).to(s.dtype.element_ty), mask=s_mask)


# --- backward --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["M"])
def db_ds_kernel(
    dy, s, b, db, ds, scale, M, N, r, rows_per_program, stride_dym, stride_dyn, stride_sm, stride_dsn, stride_dsm,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dy (M, N), s (M, r), b (N, r) -> partial db (row splits, N, r) and ds (column tiles, M, r).

    A program owns BLOCK_N columns, whose b and db stay in registers while it walks down its rows of dy.
    """
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    first = tl.program_id(1) * rows_per_program
    is_column = columns < N
    is_rank = (ranks < r)[None, :]
    dy += columns.to(tl.int64)[None, :] * stride_dyn
    ds += tl.program_id(0).to(tl.int64) * stride_dsn + ranks[None, :]
    db += (tl.program_id(1).to(tl.int64) * N + columns[:, None]) * r + ranks[None, :]
    b_tile = tl.load(b + columns[:, None] * r + ranks[None, :], mask=is_column[:, None] & is_rank, other=0.0)
    db_tile = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for begin in range(first, tl.minimum(M, first + rows_per_program), BLOCK_M):
        rows = begin + tl.arange(0, BLOCK_M)
        long_rows = rows.to(tl.int64)[:, None]
        is_row = (rows < M)[:, None]
        dy_tile = tl.load(dy + long_rows * stride_dym, mask=is_row & is_column[None, :], other=0.0)
        s_tile = tl.load(s + long_rows * stride_sm + ranks[None, :], mask=is_row & is_rank, other=0.0)
        ds_tile = tl.dot(dy_tile, b_tile, input_precision="ieee") * scale
        tl.store(ds + long_rows * stride_dsm, ds_tile.to(ds.dtype.element_ty), mask=is_row & is_rank)
        db_tile = tl.dot(tl.trans(dy_tile), s_tile, db_tile, input_precision="ieee")
    tl.store(db, (db_tile * scale).to(db.dtype.element_ty), mask=is_column[:, None] & is_rank)


@triton.jit
def _add_da(acc, x, bits, bits_mask, ds, ds_mask, DROPOUT: tl.constexpr):
    """acc + (keep * x)^T dS, of one tile and one projection."""
    if DROPOUT:
        x = tl.where(_unpack(tl.load(bits, mask=bits_mask, other=0)), x, tl.zeros_like(x))
    return tl.dot(tl.trans(x), tl.load(ds, mask=ds_mask, other=0.0), acc, input_precision="ieee")


@triton.jit(do_not_specialize=["M"])
def da_kernel(
    ds, x, bits, da, keep_scale, M, K, r, rows_per_program, stride_dsn, stride_dsm, stride_xm, stride_xk,
    NUM: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """ds (NUM, M, r), x (M, K), bits (NUM, M, ceil(K / 8)) -> partial da (row splits, NUM, r, K).

    A program owns BLOCK_K columns of all NUM results, in registers while it walks down its rows of x.
    """
    start = tl.program_id(0) * BLOCK_K
    columns = start + tl.arange(0, BLOCK_K)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    first = tl.program_id(1) * rows_per_program
    num_bytes = (K + 7) // 8
    plane = tl.cast(M, tl.int64) * num_bytes
    byte_columns = start // 8 + tl.arange(0, BLOCK_K // 8)
    is_column = columns < K
    is_byte = (byte_columns < num_bytes)[None, :]
    is_rank = ranks < r
    acc0 = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    acc1 = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    acc2 = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    for begin in range(first, tl.minimum(M, first + rows_per_program), BLOCK_M):
        rows = begin + tl.arange(0, BLOCK_M)
        long_rows = rows.to(tl.int64)[:, None]
        is_row = (rows < M)[:, None]
        x_pointers = x + long_rows * stride_xm + columns.to(tl.int64)[None, :] * stride_xk
        x_tile = tl.load(x_pointers, mask=is_row & is_column[None, :], other=0.0)
        bits_tile = bits + long_rows * num_bytes + byte_columns[None, :]
        ds_tile = ds + long_rows * stride_dsm + ranks[None, :]
        ds_mask = is_row & is_rank[None, :]
        acc0 = _add_da(acc0, x_tile, bits_tile, is_row & is_byte, ds_tile, ds_mask, DROPOUT)
        if NUM > 1:
            bits_tile += plane
            ds_tile += stride_dsn
            acc1 = _add_da(acc1, x_tile, bits_tile, is_row & is_byte, ds_tile, ds_mask, DROPOUT)
        if NUM > 2:
            bits_tile += plane
            ds_tile += stride_dsn
            acc2 = _add_da(acc2, x_tile, bits_tile, is_row & is_byte, ds_tile, ds_mask, DROPOUT)
    da += tl.program_id(1).to(tl.int64) * NUM * r * K
    da_tile = da + ranks[None, :] * K + columns[:, None]
    da_mask = is_column[:, None] & is_rank[None, :]
    tl.store(da_tile, (acc0 * keep_scale).to(da.dtype.element_ty), mask=da_mask)
    if NUM > 1:
        tl.store(da_tile + r * K, (acc1 * keep_scale).to(da.dtype.element_ty), mask=da_mask)
    if NUM > 2:
        tl.store(da_tile + 2 * r * K, (acc2 * keep_scale).to(da.dtype.element_ty), mask=da_mask)


@triton.jit(do_not_specialize=["M"])
def dx_kernel(
    dx, ds, a, bits, keep_scale, M, K, r, stride_dsn, stride_dsm,
    NUM: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dx (M, K), contiguous, += keep * (ds a) of ds (NUM, M, r), a (NUM, r, K), bits (NUM, M, ceil(K / 8))."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    start = tl.program_id(1) * BLOCK_K
    columns = start + tl.arange(0, BLOCK_K)
    num_bytes = (K + 7) // 8
    byte_columns = start // 8 + tl.arange(0, BLOCK_K // 8)
    long_rows = rows.to(tl.int64)[:, None]
    is_row = (rows < M)[:, None]
    is_column = (columns < K)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for i in tl.static_range(NUM):
        product = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for first_rank in range(0, r, BLOCK_R):
            ranks = first_rank + tl.arange(0, BLOCK_R)
            ds_pointers = ds + i * stride_dsn + long_rows * stride_dsm + ranks[None, :]
            ds_tile = tl.load(ds_pointers, mask=is_row & (ranks < r)[None, :], other=0.0)
            a_pointers = a + (i * r + ranks[:, None]) * K + columns[None, :]
            a_tile = tl.load(a_pointers, mask=(ranks < r)[:, None] & is_column, other=0.0)
            product = tl.dot(ds_tile, a_tile, product, input_precision="ieee")
        if DROPOUT:
            bits_pointers = bits + (long_rows + i * tl.cast(M, tl.int64)) * num_bytes + byte_columns[None, :]
            packed = tl.load(bits_pointers, mask=is_row & (byte_columns < num_bytes)[None, :], other=0)
            product = tl.where(_unpack(packed), product, 0.0)
        total += product
    dx += long_rows * K + columns[None, :]
    dx_tile = tl.load(dx, mask=is_row & is_column, other=0.0)
    tl.store(dx, (dx_tile + total * keep_scale).to(dx.dtype.element_ty), mask=is_row & is_column)


@triton.jit(do_not_specialize=["M"])
def sum_kernel(partials, result, num, numel, M, r, stride_n, stride_m, BLOCK: tl.constexpr):
    """partials (num, numel), added first to last -> result (numel / M / r, M, r), its last dimension contiguous."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(num):
        total += tl.load(partials + index, mask=index < numel, other=0.0)
        partials += numel
    row = index // r
    place = row // M * stride_n + row % M * stride_m + index % r
    tl.store(result + place, total.to(result.dtype.element_ty), mask=index < numel)
