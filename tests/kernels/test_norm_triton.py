"""Does a GPU's sum of squares have the bits of the host's? In Triton's interpreter, compiled, and on a GPU."""

from __future__ import annotations

import math
from importlib.util import find_spec

import pytest
import torch
from triton_process import process
from zerolite_kernels import cpu

from zerolite.runtime import cpu_kernels
from zerolite.shards.grad_norm import add_up, sum_of_squares

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(cpu.path() is None, reason="the host kernels were not built"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RUNS = [(1, 0), (128, 0), (4096, 0), (4097, 128), (40_000, 3968), (12_416, 8192 + 640), (300_000, 4000)]


def drawn(numel: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """Magnitudes over many powers of two, so that every order of summation rounds differently."""
    generator = torch.Generator().manual_seed(numel)
    values = torch.randn(numel, generator=generator) * torch.randn(numel, generator=generator).mul(3).exp() * scale
    return values.to(dtype)


def on_the_host(values: torch.Tensor, position: int) -> float:
    return add_up(cpu_kernels.squares(values, position))


@pytest.fixture(scope="module")
def interpreted():
    yield from process("1")


@pytest.fixture(scope="module")
def compiled():
    yield from process("0")


def computed(values: torch.Tensor, position: int) -> float:
    from zerolite_kernels.norm import triton_kernels

    return triton_kernels.sum_of_squares(values, position).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel, position", RUNS)
def test_the_bits_are_those_of_the_host(interpreted, numel, position, dtype):
    values = drawn(numel, dtype)
    assert interpreted(computed, values, position) == on_the_host(values, position) > 0


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_beyond_fp32_are_exact(interpreted, scale):
    """Where fp32's squares would be 0 or Inf; a norm needs no second pass for them."""
    values = drawn(5000, torch.float32, scale)
    assert interpreted(computed, values, 0) == on_the_host(values, 0)
    assert 0 < on_the_host(values, 0) < math.inf


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_value_that_is_not_finite_shows(interpreted, value):
    values = drawn(9000, torch.float32)
    values[5000] = value
    assert not math.isfinite(interpreted(computed, values, 0))


def compile_for(capability: int) -> list[int]:
    """Bytes of shared memory of each kernel and dtype."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from zerolite_kernels.norm import triton_kernels as norm

    numbers = {"first": "i32", "numel": "i32", "num_entries": "i32"}
    constants = {"BLOCKS": norm.BLOCKS, "COLUMNS": 32, "ROWS": 128, "UNROLL": norm.UNROLL, "WIDTH": norm.WIDTH}
    shared = []
    for kernel, pointers in [
        *((norm.entries_kernel, {"x": f"*{element}", "entries": "*fp64"}) for element in ("fp32", "bf16", "fp16")),
        (norm.total_kernel, {"entries": "*fp64", "result": "*fp64"}),
    ]:
        types = {**pointers, **numbers, **dict.fromkeys(constants, "constexpr")}
        own = {name: value for name, value in constants.items() if name in kernel.arg_names}
        source = ASTSource(kernel, {name: types[name] for name in kernel.arg_names}, own)
        binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
        assert binary.asm["cubin"]
        shared.append(binary.metadata.shared)
    return shared


def test_kernels_compile_for_old_and_new_gpus(compiled):
    for capability in (80, 90):
        assert max(compiled(compile_for, capability)) <= 48 << 10


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel, position", [*RUNS, (20_000_000, 128)])
def test_a_gpu_gives_the_bits_of_the_host(numel, position, dtype):
    values = drawn(numel, dtype)
    assert sum_of_squares(values.cuda(), position).item() == on_the_host(values, position)
