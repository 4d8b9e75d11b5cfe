"""Every host kernel in plain torch: the truth for tests, and what serves where they could not be built.

The same operations in the same order as cpu/*.h, so the same bits. Memory is walked in chunks, so that temporaries stay
small whatever a command's size.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Iterator
from typing import NamedTuple

import numpy
import torch

from zerolite_kernels.cpu import command as commands
from zerolite_kernels.cpu.command import BLOCK_NUMEL, PARTIAL_NUMEL, Command

Buffer = mmap.mmap | memoryview  # that can be written to

CHUNK_NUMEL = 16 * PARTIAL_NUMEL
COLUMNS = 32  # of a partial sum: element i of a region is added to column i mod COLUMNS
INFINITE, NOT_A_NUMBER = 0x7F800000, 0x7FC00000  # bits of fp32
NEAREST = -(1 << 31) | 1 << 12  # noise that stands for one half, in either half

GRADIENT_DTYPES = {
    commands.FP32: torch.float32,
    commands.BF16: torch.bfloat16,
    commands.FP16: torch.float16,
    commands.FP64: torch.float64,
}
COPY_DTYPES = {commands.MASTER_BF16: torch.bfloat16, commands.MASTER_FP16: torch.float16}


def execute(memory: Buffer | None, command: Command, first: int, last: int) -> None:
    """Elements [first, last) of a command whose addresses are offsets in `memory`, a writable buffer; None: pointers.

    Ranges are cut as for those in C++: anywhere, at multiples of BLOCK_NUMEL for int8 states, at multiples of
    PARTIAL_NUMEL for NORM and PREPARE.
    """
    arena = Arena(memory, command)
    first, last = max(first, command.first), min(last, command.last)
    if command.op == commands.FILL:
        if first < last:
            arena.elements(command.gradient, torch.uint8, first, last).zero_()
        return
    for begin, end in chunks(first, last):
        if command.op == commands.ACCUMULATE:
            accumulate(arena, begin, end)
        elif command.op == commands.NORM:
            arena.results(begin, end, 1)[:, 0] = partial_sums(arena.gradient(begin, end).double(), begin)
        else:
            step(arena, begin, end)


def chunks(first: int, last: int) -> Iterator[tuple[int, int]]:
    """Cut [first, last) at multiples of CHUNK_NUMEL."""
    while first < last:
        end = min((first // CHUNK_NUMEL + 1) * CHUNK_NUMEL, last)
        yield first, end
        first = end


class Arena(NamedTuple):
    """A command's tensors: each method gives elements [begin, end) of its region as they lie in memory."""

    memory: Buffer | None
    command: Command

    def elements(self, offset: int, dtype: torch.dtype, begin: int, end: int) -> torch.Tensor:
        start, numel = offset + begin * dtype.itemsize, end - begin
        if self.memory is not None:
            return torch.frombuffer(self.memory, dtype=dtype, count=numel, offset=start)
        return torch.frombuffer((ctypes.c_char * (numel * dtype.itemsize)).from_address(start), dtype=dtype)

    def gradient(self, begin: int, end: int) -> torch.Tensor:
        return self.elements(self.command.gradient, GRADIENT_DTYPES[self.command.gradient_dtype], begin, end)

    def scales(self, offset: int, begin: int, end: int) -> torch.Tensor:
        return self.elements(offset, torch.float32, begin // BLOCK_NUMEL, -(-end // BLOCK_NUMEL))

    def results(self, begin: int, end: int, width: int) -> torch.Tensor:
        """(partial blocks, width) fp64."""
        origin = self.command.first // PARTIAL_NUMEL
        first, last = begin // PARTIAL_NUMEL - origin, -(-end // PARTIAL_NUMEL) - origin
        return self.elements(self.command.result, torch.float64, width * first, width * last).view(-1, width)


def accumulate(arena: Arena, begin: int, end: int) -> None:
    is_fp64 = arena.command.gradient_dtype == commands.FP64
    total = arena.elements(arena.command.parameter, torch.float64 if is_fp64 else torch.float32, begin, end)
    if arena.command.flags & commands.STORE:
        total.copy_(arena.gradient(begin, end))
    else:
        total.add_(arena.gradient(begin, end))


def partial_sums(values: torch.Tensor, begin: int) -> torch.Tensor:
    """(partial blocks,) fp64: sums of squares of fp64 values, the first of which is element `begin` of its region."""
    end = begin + values.numel()
    values = torch.nn.functional.pad(values, (begin % PARTIAL_NUMEL, -end % PARTIAL_NUMEL))
    rows = values.view(-1, PARTIAL_NUMEL // COLUMNS, COLUMNS)
    sums = torch.zeros_like(rows[:, 0])
    for row in rows.unbind(1):
        sums += row * row
    while sums.shape[1] > 1:
        left, right = sums.chunk(2, dim=1)
        sums = left + right
    return sums[:, 0]


# --- rules -----------------------------------------------------------------------------------------------------------


def step(arena: Arena, begin: int, end: int) -> None:
    """STEP and PREPARE. A product and a sum are two operations, as in C++: addcmul and lerp would round once."""
    c = arena.command
    p, m, v = load_parameter(arena, begin, end), *load_states(arena, begin, end)
    if c.op == commands.STEP and c.rule == commands.LAMB:
        return store_parameter(arena, begin, end, p - lamb_direction(c, p, m, v) * (c.lr * c.trust_ratio))
    g = arena.gradient(begin, end).to(p.dtype) * c.multiplier
    if c.op == commands.PREPARE:
        store_states(arena, begin, end, *moments(c, g, m, v))
        direction = lamb_direction(c, p, *load_states(arena, begin, end))  # of what is kept: what the step will see
        squares = [partial_sums(values.double(), begin) for values in (p, direction)]
        arena.results(begin, end, 2).copy_(torch.stack(squares, dim=1))
        return
    if c.rule == commands.LION:
        update = (m * c.beta1 + g * (1 - c.beta1)).sign() * c.lr
        m = m * c.beta2 + g * (1 - c.beta2)
    else:
        m, v = moments(c, g + p * c.weight_decay if c.rule == commands.ADAM else g, m, v)
        update = m * (c.lr / c.bias_correction1) / (root(v) * (1 / c.bias_correction2_sqrt) + c.eps)
    if c.rule != commands.ADAM:
        p = p * (1 - c.lr * c.weight_decay)
    store_parameter(arena, begin, end, p - update)
    store_states(arena, begin, end, m, v)


def root(v: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(numpy.sqrt(v.numpy()))  # correctly rounded, which torch's (MKL's) is not


def moments(c: Command, g: torch.Tensor, m: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return m * c.beta1 + g * (1 - c.beta1), v * c.beta2 + g * (1 - c.beta2) * g


def lamb_direction(c: Command, p: torch.Tensor, m: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return m * (1 / c.bias_correction1) / (root(v) * (1 / c.bias_correction2_sqrt) + c.eps) + p * c.weight_decay


# --- the parameter, as it is kept ------------------------------------------------------------------------------------


def load_parameter(arena: Arena, begin: int, end: int) -> torch.Tensor:
    """fp32 (fp64 where it is kept so); the memory itself where it is in place."""
    c = arena.command
    if c.parameter_kind == commands.SPLIT_BF16:
        high = arena.elements(c.parameter, torch.int16, begin, end).int()
        return ((high << 16) + arena.elements(c.master, torch.int16, begin, end)).view(torch.float32)
    if c.parameter_kind in COPY_DTYPES:
        return arena.elements(c.master, torch.float32, begin, end)
    dtype = torch.float64 if c.parameter_kind == commands.IN_PLACE_FP64 else torch.float32
    return arena.elements(c.parameter, dtype, begin, end)


def store_parameter(arena: Arena, begin: int, end: int, p: torch.Tensor) -> None:
    c = arena.command
    if c.parameter_kind == commands.SPLIT_BF16:
        bits = torch.where(p.isnan(), NOT_A_NUMBER, p.view(torch.int32))  # rounding must not carry out of a NaN
        arena.elements(c.parameter, torch.int16, begin, end).copy_((bits + 0x8000) >> 16)
        arena.elements(c.master, torch.int16, begin, end).copy_(bits)
        return
    load_parameter(arena, begin, end).copy_(p)
    if c.parameter_kind in COPY_DTYPES:
        arena.elements(c.parameter, COPY_DTYPES[c.parameter_kind], begin, end).copy_(p)


# --- states, as they are kept ----------------------------------------------------------------------------------------


def load_states(arena: Arena, begin: int, end: int) -> list[torch.Tensor | None]:
    """Momentum and variance (None for Lion) in fp32, or fp64."""
    c = arena.command
    kept = [(c.exp_avg, c.exp_avg_scale, torch.int8, decode_exp_avg)]
    kept.append((c.exp_avg_sq, c.exp_avg_sq_scale, torch.uint8, decode_exp_avg_sq))
    if c.rule == commands.LION:
        del kept[1]
    if c.states == commands.STATES_INT8:
        states = [
            decode(arena.elements(offset, dtype, begin, end), arena.scales(scale, begin, end))
            for offset, scale, dtype, decode in kept
        ]
    else:
        states = [arena.elements(offset, state_dtype(c), begin, end) for offset, *_ in kept]
        states = [state.float() if state.dtype == torch.bfloat16 else state for state in states]
    return states if len(states) == 2 else [*states, None]


def store_states(arena: Arena, begin: int, end: int, m: torch.Tensor, v: torch.Tensor | None) -> None:
    c = arena.command
    kept = [(m, c.exp_avg, c.exp_avg_scale)]
    if v is not None:
        kept.append((v, c.exp_avg_sq, c.exp_avg_sq_scale))
    if c.states == commands.STATES_FP32:
        for state, offset, _ in kept:
            arena.elements(offset, state.dtype, begin, end).copy_(state)
        return
    noise = draw(c.seed, c.position, begin, end)
    for which, (state, offset, scale) in enumerate(kept):
        if c.states == commands.STATES_INT8:
            codes, scales = (encode_exp_avg_sq if which else encode_exp_avg)(state, noise)
            arena.elements(offset, codes.dtype, begin, end).copy_(codes)
            arena.scales(scale, begin, end).copy_(scales)
        else:
            half = noise >> 16 & 0xFFFF if which else noise & 0xFFFF
            bits = torch.where(state.isnan(), NOT_A_NUMBER, state.view(torch.int32)) + half >> 16
            arena.elements(offset, torch.int16, begin, end).copy_(bits)


def state_dtype(c: Command) -> torch.dtype:
    if c.states == commands.STATES_BF16:
        return torch.bfloat16
    return torch.float64 if c.parameter_kind == commands.IN_PLACE_FP64 else torch.float32


def draw(seed: int, position: int, begin: int, end: int) -> torch.Tensor:
    """int32 noise of elements [begin, end): lowbias32 over a counter, offset by splitmix64's finaliser of the seed."""
    key = (seed + 0x9E3779B97F4A7C15) % 2**64
    key = (key ^ key >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    key = (key ^ key >> 27) * 0x94D049BB133111EB % 2**64
    counter = torch.arange(end - begin) + ((key ^ key >> 32) + position + begin) % 2**32
    x = counter.remainder_(2**32).sub_(2**31).int() ^ -(2**31)
    x ^= x >> 16 & 0xFFFF
    x *= 0x7FEB352D
    x ^= x >> 15 & 0x1FFFF
    x *= 0x846CA68B - 2**32
    return x ^ (x >> 16 & 0xFFFF)


# --- int8 states, see [Note: int8 states] in cpu/states.h ------------------------------------------------------------


def decode_exp_avg(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """(numel,) int8 and (blocks,) fp32 -> (numel,) fp32."""
    return codes.float() * scales.repeat_interleave(BLOCK_NUMEL)[: codes.numel()]


def decode_exp_avg_sq(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """(numel,) uint8 and (blocks,) fp32 -> (numel,) fp32."""
    base = scales.view(torch.int32).repeat_interleave(BLOCK_NUMEL)[: codes.numel()]
    return ((codes.int() << 19) + base).view(torch.float32)


def encode_exp_avg(x: torch.Tensor, noise: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(numel,) fp32 from the start of a block -> int8 codes and scales; without noise: to nearest."""
    numel, x, noise = (
        x.numel(),
        blocks(x),
        blocks(torch.full_like(x, NEAREST, dtype=torch.int32) if noise is None else noise),
    )
    largest = (x.view(torch.int32) & 0x7FFFFFFF).amax(1)
    exponent = (largest >> 23).clamp(max=240)
    step = torch.where(exponent > 6, exponent - 6 << 23, 0).view(torch.float32)
    step = torch.where(largest < INFINITE, step, 0)
    limit = 127 * step[:, None]
    shift = (1536 * torch.where(step > 0, step, 1)).view(torch.int32)[:, None]
    x = torch.minimum(torch.maximum(x.nan_to_num(0), -limit), limit) + (noise & 0x1FFF | shift).view(torch.float32)
    codes = (x.view(torch.int32) >> 13).to(torch.int8)
    return codes.flatten()[:numel], torch.where(largest < INFINITE, step, math.nan)


def encode_exp_avg_sq(x: torch.Tensor, noise: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(numel,) fp32, none negative, from the start of a block -> uint8 codes and scales; without noise: to nearest."""
    numel, x, noise = (
        x.numel(),
        blocks(x),
        blocks(torch.full_like(x, NEAREST, dtype=torch.int32) if noise is None else noise),
    )
    largest = (x.view(torch.int32) & 0x7FFFFFFF).amax(1)
    base = (largest >> 23).clamp(min=16) - 15 << 23
    base = torch.where(largest == 0, 0, base)
    zero = torch.where(largest < INFINITE, base >> 19, 1 << 13)[:, None]
    codes = ((x.view(torch.int32) + (noise >> 13 & 0x7FFFF) >> 19) - zero).clamp(0, 255)
    return codes.to(torch.uint8).flatten()[:numel], torch.where(largest < INFINITE, base, NOT_A_NUMBER).view(
        torch.float32
    )


def blocks(x: torch.Tensor) -> torch.Tensor:
    """(numel,) -> (blocks, BLOCK_NUMEL), filled up with zeros."""
    return torch.nn.functional.pad(x, (0, -x.numel() % BLOCK_NUMEL)).view(-1, BLOCK_NUMEL)
