"""LoRA's Triton kernels: in Triton's interpreter against plain torch and fp64, compiled, and run on a GPU.

The interpreter is chosen when triton is imported, so these tests run in processes of their own: one that interprets,
one that compiles; neither needs a GPU.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from importlib.util import find_spec

import crosses
import pytest
import torch
from lora_layers import error, error_ratios, layer, masks
from triton_process import process
from zerolite_kernels.lora import linears, reference

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}  # of a block: A100, RTX 3090, RTX 4090, H100
CASES = [  # M, K, N, r, n, dropout
    (9, 41, 341, 8, 3, 0.05),
    (41, 341, 9, 16, 3, 0.5),
    (341, 9, 41, 3, 1, 0.05),
    (41, 9, 4231, 1, 2, 0.05),
    (9, 4231, 41, 8, 1, 0.05),
    (4231, 9, 9, 8, 1, 0.05),
    (70, 100, 130, 70, 2, 0.3),
    (9, 41, 9, 256, 1, 0.05),
    (33, 64, 48, 16, 4, 0.05),
    (65, 72, 40, 64, 3, 0.0),
]


def use_kernels() -> None:
    """Wherever there is one."""
    linears.CHOICES = dict.fromkeys(linears.CHOICES, ("triton", "triton"))


@pytest.fixture(scope="module")
def interpreted():
    yield from process("1", use_kernels)


@pytest.fixture(scope="module")
def compiled():
    yield from process("0", use_kernels)


def set_splits(programs: int, share: int) -> None:
    from zerolite_kernels.lora import triton_launch

    triton_launch.TARGET_PROGRAMS, triton_launch.MIN_SHARE = programs, share


def ratios(case, dtype: torch.dtype, is_split: bool):
    M, K, N, r, n, dropout = case
    set_splits(264, 64 if is_split else 1 << 20)
    num_draws = 3 if r == 1 else 1 if max(M, K, N) > 4000 else 2  # rank 1: one rounding of S is in a whole row of y
    return error_ratios((M, K), N, r, dropout, "triton", num_draws, n=n, dtype=dtype)


@pytest.mark.parametrize(
    "case, dtype, is_split",
    [(case, torch.float32, True) for case in CASES if case[0] < 4000]
    + [(case, torch.float16, False) for case in CASES if case[1] < 4000],
    ids=str,
)
def test_error_against_fp64_is_at_most_that_of_plain_torch(interpreted, case, dtype, is_split):
    """At most 1.2 times, per output and gradient, in the same precision and with the same bits; bf16 needs a GPU."""
    found = interpreted(ratios, case, dtype, is_split)
    assert max(found.values()) <= 1.2, found


def kernels_and_reference(dropout: float):
    """Each kernel's results, and the reference's with the same bits, in fp64."""
    from zerolite_kernels.lora import triton_launch

    set_splits(264, 16)
    given = layer((70, 141), 150, r=5)
    x, A, B, dy = given.x.detach(), torch.stack(given.As).detach(), given.Bs[0].detach(), given.dys[0]
    S, bits = triton_launch.lora_xa(x, A, dropout, seed=2**62 + 7)
    wide = [t.double() for t in (x, A, B, dy, S)]
    kept = wide[0].expand(3, -1, -1)
    if bits is not None:
        kept = kept * torch.stack([reference.unpack_bits(plane, 141) for plane in bits]) / (1 - dropout)
    pairs = {"S": (S, kept @ wide[1].mT)}
    dS, dS64 = torch.empty_like(S), torch.empty_like(wide[4])
    for i in range(3):
        dB = triton_launch.lora_db_ds(dy, S[i], B, 1.5, dS[i], torch.float32)
        dB64 = reference.lora_db_ds(wide[3], wide[4][i], wide[2], 1.5, dS64[i], torch.float64)
    pairs |= {"dB": (dB, dB64), "dS": (dS, dS64)}
    dA = triton_launch.lora_da(dS, x, bits, dropout, torch.float32)
    pairs["dA"] = dA, reference.lora_da(dS.double(), wide[0], bits, dropout, torch.float64)
    dx, dx64 = torch.ones_like(x), torch.ones_like(wide[0])
    triton_launch.lora_dx_(dx, dS, A, bits, dropout)
    reference.lora_dx_(dx64, dS.double(), wide[1], bits, dropout)
    return pairs | {"dx": (dx, dx64)}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_each_kernel_computes_what_the_reference_does(interpreted, dropout):
    """fp32 against the reference in fp64, kernel by kernel, from the same operands and bits."""
    for name, (actual, expected) in interpreted(kernels_and_reference, dropout).items():
        assert error(actual, expected) < 5e-7, name


def reruns():
    set_splits(264, 16)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        given = layer((70, 141), 150, r=5)
        runs.append(given.results(given.ours(0.05, backend="triton")))
    return [{name: t.detach() for name, t in run.items()} for run in runs]


def test_reruns_are_bit_identical(interpreted):
    """The same seed gives the same bits, another one other masks."""
    first, second, other = interpreted(reruns)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["y0"], other["y0"])


def drawn_masks(dropout: float):
    set_splits(264, 1 << 20)
    torch.manual_seed(0)
    return masks(layer((100, 1001), 1, r=1, dtype=torch.float16).ours(dropout, backend="triton"))


@pytest.mark.parametrize("dropout", [0.05, 0.5])
def test_masks_keep_at_the_given_rate_and_are_independent(interpreted, dropout):
    """Rates within five standard deviations; the three masks, and neighbours in each, are uncorrelated."""
    keeps = torch.stack(interpreted(drawn_masks, dropout)).double()
    numel, deviation = keeps[0].numel(), (dropout * (1 - dropout)) ** 0.5
    centred = (keeps - (1 - dropout)) / deviation
    assert (centred.mean(dim=(1, 2)).abs() < 5 * numel**-0.5).all()
    pairs = [(centred[i], centred[j]) for i, j in [(0, 1), (0, 2), (1, 2)]]
    pairs += [(c[:, 1:], c[:, :-1]) for c in centred] + [(c[1:], c[:-1]) for c in centred]
    for left, right in pairs:
        assert abs((left * right).mean()) < 5 * numel**-0.5


def strided():
    """A transposed input, and dropout on a view of three dimensions."""
    given = layer((6, 7, 41), 9, r=3)
    given.x = torch.randn(7, 41, 6, generator=torch.Generator().manual_seed(1)).permute(2, 0, 1).requires_grad_()
    given.dys = [dy[..., :1].expand(-1, -1, 9) for dy in given.dys]
    outputs = given.ours(0.3, backend="triton")
    keeps = masks(outputs)
    wide = given.to(torch.float64)
    return given.results(outputs), wide.results(wide.plain(0.3, keeps))


def test_tensors_may_be_strided(interpreted):
    """Strides of x and dy are honoured."""
    actual, expected = interpreted(strided)
    for name in expected:
        assert error(actual[name], expected[name]) < 5e-6, name


# --- compiled --------------------------------------------------------------------------------------------------------


def launches(dtype: torch.dtype, n: int, r: int, dropout: float) -> list[tuple]:
    """(kernel, arguments by name, options) of every launch of a forward and backward at M = 8192, K = N = 4096."""
    from triton.runtime.jit import JITFunction
    from zerolite_kernels.lora import triton_launch

    found, M, K, N = [], 8192, 4096, 4096

    def record(self, *args, grid, warmup, **keywords):
        found.append((self, {**dict(zip(self.arg_names, args, strict=False)), **keywords}))

    def empty(*shape):
        return torch.empty(*shape, dtype=dtype, device="meta")

    set_splits(264, 256)
    run, JITFunction.run = JITFunction.run, record
    try:
        x, A = empty(M, K), empty(n, r, K)
        S, bits = triton_launch.lora_xa(x, A, dropout, 2**62)
        dS = torch.empty_like(S)
        triton_launch.lora_db_ds(empty(M, N), S[0], empty(N, r), 2.0, dS[0], dtype)
        triton_launch.lora_da(dS, x, bits, dropout, dtype)
        triton_launch.lora_dx_(empty(M, K), dS, A, bits, dropout)
    finally:
        JITFunction.run = run
    return found


POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8"}


def compile_all(dtype: torch.dtype, n: int, r: int, dropout: float, capability: int) -> dict[str, tuple[int, int]]:
    """Kernel -> bytes of stack and of shared memory, compiled for a compute capability as its launcher asks."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    used = {}
    for kernel, values in launches(dtype, n, r, dropout):
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(kernel.params):
            name, value = parameter.name, values.pop(parameter.name)
            is_special = isinstance(value, int) and not parameter.do_not_specialize  # what triton.jit does with it
            if parameter.is_constexpr or (is_special and value == 1):
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = POINTERS[value.dtype]
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if isinstance(value, torch.Tensor) or (signature[name] != "constexpr" and is_special and value % 16 == 0):
                attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constants, attributes)
        binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=values)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        stack = int(re.search(r"STACK:(\d+)", listing)[1])
        used[kernel.__name__] = stack, binary.metadata.shared
    return used


def missing_tool() -> str | None:
    """Why nothing can be compiled here."""
    import triton

    try:
        triton.knobs.nvidia.ptxas.path, triton.knobs.nvidia.cuobjdump.path  # noqa: B018
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


LAYERS = [
    (torch.bfloat16, 3, 16, 0.05),
    (torch.bfloat16, 1, 8, 0.0),
    (torch.float16, 3, 256, 0.0),
    (torch.float32, 1, 8, 0.05),
    (torch.float32, 3, 64, 0.05),
]


@pytest.mark.parametrize("layer, capability", crosses.each(LAYERS, [90, 89, 80, 86, 90]), ids=str)
def test_kernels_compile_for_every_gpu(compiled, layer, capability):
    """ptxas accepts each one; none spills registers or asks for more shared memory than there is."""
    if (reason := compiled(missing_tool)) is not None:
        pytest.skip(f"triton's compiler for NVIDIA is not here: {reason}")
    used = compiled(compile_all, *layer, capability)
    assert set(used) >= {"xa_kernel", "db_ds_kernel", "da_kernel", "dx_kernel", "sum_kernel"}
    for name, (stack_bytes, shared_bytes) in used.items():
        assert stack_bytes == 0, name
        assert shared_bytes <= SHARED_BYTES[capability], name


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_on_a_gpu_is_at_most_that_of_plain_torch(case, dtype):
    """As in the interpreter, with the path that is chosen there; and a rerun gives the same bits."""
    M, K, N, r, n, dropout = case
    found = error_ratios((M, K), N, r, dropout, n=n, dtype=dtype, device="cuda")
    assert max(found.values()) <= 1.2, found
    given, runs = layer((M, K), N, r, n=n, dtype=dtype, device="cuda"), []
    for _ in range(2):
        torch.manual_seed(0)
        runs.append(given.results(given.ours(dropout)))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
