"""The host kernels against torch.optim, formulas in fp64 and torch's conversions; and every path, cut and reference
against each other, bit by bit."""

import ctypes
import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from zerolite_kernels import cpu
from zerolite_kernels.cpu import command as K
from zerolite_kernels.cpu import reference

LIBRARY = cpu.load()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the host kernels were not built: no C++ compiler at install")

PATHS = [p for p in (b"avx512", b"avx2", b"plain") if LIBRARY is not None and LIBRARY.zl_use(p) == 0]
BEST = PATHS[0] if PATHS else b""
if PATHS:
    LIBRARY.zl_use(BEST)

RULES = [K.ADAM, K.ADAMW, K.LION, K.LAMB]
STATES = [K.STATES_FP32, K.STATES_BF16, K.STATES_INT8]
FP32_KINDS = [K.IN_PLACE_FP32, K.SPLIT_BF16, K.MASTER_BF16, K.MASTER_FP16]
GRADIENTS = {K.FP32: torch.float32, K.BF16: torch.bfloat16, K.FP16: torch.float16, K.FP64: torch.float64}
LOW_PRECISION = {K.SPLIT_BF16: torch.bfloat16, K.MASTER_BF16: torch.bfloat16, K.MASTER_FP16: torch.float16}
LR, BETAS, EPS, DECAY, CLIP = 1e-2, (0.9, 0.99), 1e-8, 0.1, 0.5
ALL_KINDS = [
    (rule, states, kind, gradient)
    for rule, states, kind, gradient in itertools.product(RULES, STATES, range(5), GRADIENTS)
    if (kind == K.IN_PLACE_FP64) == (gradient == K.FP64) and not (gradient == K.FP64 and states)
]


class Region:
    """A region of `numel` elements in an arena of its own, at odd addresses, with canaries between the tensors.

    `run` does steps with the gradients that `gradient_of` gives; the runs are `pieces` of the region, each cut anew.
    """

    GAP = 61

    def __init__(self, rule, states, kind, gradient, numel, first=0, last=None, seed=0):
        self.rule, self.states, self.kind, self.gradient_dtype, self.numel = rule, states, kind, gradient, numel
        self.first, self.last = first, numel if last is None else last
        is_fp64 = kind == K.IN_PLACE_FP64
        full = torch.float64 if is_fp64 else torch.float32
        state = {K.STATES_FP32: full, K.STATES_BF16: torch.bfloat16, K.STATES_INT8: torch.uint8}[states]
        blocks, partials = -(-numel // K.BLOCK_NUMEL), -(-numel // K.PARTIAL_NUMEL)
        sizes = {
            "gradient": (GRADIENTS[gradient], numel),
            "parameter": (LOW_PRECISION.get(kind, full), numel),
            "master": (torch.int16 if kind == K.SPLIT_BF16 else torch.float32, numel if kind in LOW_PRECISION else 0),
            "exp_avg": (state, numel),
            "exp_avg_scale": (torch.float32, blocks),
            "exp_avg_sq": (state, numel),
            "exp_avg_sq_scale": (torch.float32, blocks),
            "result": (torch.float64, 2 * partials),
        }
        self.offsets, self.tensors, end = {}, {}, self.GAP
        for name, (dtype, count) in sizes.items():
            self.offsets[name], end = end, end + count * dtype.itemsize + self.GAP
        self.arena = np.full(end, 0xA5, np.uint8)
        for name, (dtype, count) in sizes.items():
            part = memoryview(self.arena)[self.offsets[name] :][: count * dtype.itemsize]
            self.tensors[name] = torch.frombuffer(part, dtype=dtype).zero_() if count else torch.zeros(0, dtype=dtype)
        self.step = 0
        self.load(initial(numel, seed).to(full))

    def load(self, full: torch.Tensor) -> None:
        """Set the parameter."""
        if self.kind == K.SPLIT_BF16:
            bits = full.view(torch.int32)
            self.tensors["parameter"].view(torch.int16).copy_((bits + 0x8000) >> 16)
            self.tensors["master"].copy_(bits)
        else:
            self.tensors["master" if self.kind in LOW_PRECISION else "parameter"].copy_(full)
            if self.kind in LOW_PRECISION:
                self.tensors["parameter"].copy_(full)

    def full(self) -> torch.Tensor:
        """The parameter in fp32, or fp64."""
        if self.kind == K.SPLIT_BF16:
            high, low = self.tensors["parameter"].view(torch.int16).int(), self.tensors["master"].int()
            return ((high << 16) + low).view(torch.float32)
        return self.tensors["master" if self.kind in LOW_PRECISION else "parameter"].clone()

    def state(self, name: str) -> torch.Tensor:
        if self.states != K.STATES_INT8:
            return self.tensors[name].to(torch.float64 if self.kind == K.IN_PLACE_FP64 else torch.float32)
        out = torch.zeros(self.numel)
        decode = getattr(LIBRARY, f"zl_decode_{name}")
        decode(self.tensors[name].data_ptr(), self.tensors[f"{name}_scale"].data_ptr(), out.data_ptr(), self.numel)
        return out

    def command(self, op=K.STEP, **changes) -> K.Command:
        t = max(self.step, 1)
        fields = {
            "op": op, "rule": self.rule, "states": self.states, "gradient_dtype": self.gradient_dtype,
            "parameter_kind": self.kind, "numel": self.numel, "first": self.first, "last": self.last, **self.offsets,
            "seed": 1000 + t, "position": 7, "multiplier": CLIP, "lr": LR, "beta1": BETAS[0], "beta2": BETAS[1],
            "eps": EPS, "weight_decay": DECAY, "bias_correction1": 1 - BETAS[0] ** t,
            "bias_correction2_sqrt": math.sqrt(1 - BETAS[1] ** t), "trust_ratio": 1.0,
        }  # fmt: skip
        return K.Command(**(fields | changes))

    def do(self, command: K.Command, cuts=(), execute=None) -> None:
        if execute is not None:
            return execute(memoryview(self.arena), command, command.first, command.last)
        marks = [0, *cuts, max(self.numel, command.last)]
        for first, last in zip(marks, marks[1:], strict=False):
            assert LIBRARY.zl_execute(self.arena.ctypes.data, command, first, last) == 0

    def run(self, steps: int, cuts=(), execute=None, unused=slice(0, 0)) -> None:
        for _ in range(steps):
            self.step += 1
            self.tensors["gradient"].copy_(gradient_of(self.numel, self.step))[unused] = 0
            command = self.command()
            if self.rule == K.LAMB:
                command.op = K.PREPARE
                self.do(command, [cut // K.PARTIAL_NUMEL * K.PARTIAL_NUMEL for cut in cuts], execute)
                # Of the first partial block alone: any number will do here.
                squares = self.tensors["result"][:2].tolist()
                command.op, command.trust_ratio = K.STEP, math.sqrt(squares[0] / squares[1]) if squares[1] else 1.0
            self.do(command, cuts, execute)

    def bytes(self) -> bytes:
        return self.arena.tobytes()


def initial(numel: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient_of(numel: int, step: int) -> torch.Tensor:
    return 0.1 * torch.randn(numel, generator=torch.Generator().manual_seed(100 + step))


@pytest.fixture(params=PATHS, ids=lambda path: path.decode())
def path(request):
    assert LIBRARY.zl_use(request.param) == 0 and LIBRARY.zl_path() == request.param
    yield request.param
    LIBRARY.zl_use(BEST)


# --- against what we did not write -----------------------------------------------------------------------------------


def in_torch(region: Region, steps: int, dtype: torch.dtype) -> tuple[torch.Tensor, dict]:
    """The same gradients through torch.optim: the parameter and its states."""
    parameter = torch.nn.Parameter(initial(region.numel).to(torch.float32).to(dtype))
    if region.kind == K.IN_PLACE_FP64:
        parameter = torch.nn.Parameter(initial(region.numel))
    optimizer = {K.ADAM: torch.optim.Adam, K.ADAMW: torch.optim.AdamW}[region.rule]
    optimizer = optimizer([parameter], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    for step in range(1, steps + 1):
        gradient = gradient_of(region.numel, step).to(GRADIENTS[region.gradient_dtype])
        parameter.grad = gradient.to(dtype) * CLIP
        optimizer.step()
    return parameter.detach(), optimizer.state[parameter]


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, bound: float, path: float) -> None:
    """|ours - theirs| <= bound (|theirs| + path), element by element; `path`: how far a number has come from."""
    assert ours.dtype == theirs.dtype
    ratio = (ours - theirs).abs() / (theirs.abs() + path)
    assert ratio.numel() == 0 or ratio.max() <= bound, f"{ratio.max():.2e} > {bound}"


@pytest.mark.parametrize("numel", [0, 1, 15, 16, 17, 1023, 1025])
@pytest.mark.parametrize("rule", [K.ADAM, K.ADAMW], ids=["adam", "adamw"])
def test_ten_steps_are_those_of_torch(rule, numel, path):
    """Parameters, momenta and variances after ten steps, for every way to keep a parameter and every gradient."""
    for kind, gradient in itertools.product(FP32_KINDS, [K.FP32, K.BF16, K.FP16]):
        region = Region(rule, K.STATES_FP32, kind, gradient, numel)
        region.run(10)
        parameter, states = in_torch(region, 10, torch.float32)
        assert_close(region.full(), parameter, 1e-6, 10 * LR)
        assert_close(region.state("exp_avg"), states["exp_avg"], 1e-6, 0.1 * CLIP)
        assert_close(region.state("exp_avg_sq"), states["exp_avg_sq"], 1e-6, 0)
        if kind != K.SPLIT_BF16 and kind in LOW_PRECISION:
            assert torch.equal(region.tensors["parameter"], region.full().to(LOW_PRECISION[kind]))


@pytest.mark.parametrize("kind", FP32_KINDS)
def test_ten_steps_on_a_million_are_those_of_torch(kind):
    """The size of a real bucket, one more than a power of two."""
    region = Region(K.ADAMW, K.STATES_FP32, kind, K.BF16, 1048577)
    region.run(10)
    assert_close(region.full(), in_torch(region, 10, torch.float32)[0], 1e-6, 10 * LR)


@pytest.mark.parametrize("rule", [K.ADAM, K.ADAMW], ids=["adam", "adamw"])
def test_fp64_is_torch_to_twelve_digits(rule, path):
    """The arithmetic itself: in fp64 nothing hides behind rounding."""
    region = Region(rule, K.STATES_FP32, K.IN_PLACE_FP64, K.FP64, 1025)
    region.run(10)
    parameter, states = in_torch(region, 10, torch.float64)
    assert_close(region.full(), parameter, 1e-12, 0)
    assert_close(region.state("exp_avg_sq"), states["exp_avg_sq"], 1e-12, 0)


@pytest.mark.parametrize(
    ("kind", "gradient", "bound"), [(K.IN_PLACE_FP64, K.FP64, 1e-12), (K.MASTER_BF16, K.FP32, 1e-6)]
)
def test_lion_is_its_formula(kind, gradient, bound, path):
    """Chen et al. 2023, algorithm 2, written out in fp64; an element that never had a gradient has the sign 0."""
    region = Region(K.LION, K.STATES_FP32, kind, gradient, 5000)
    region.run(10, unused=slice(0, 100))
    parameter, momentum = initial(5000).to(region.full().dtype).double(), torch.zeros(5000, dtype=torch.float64)
    for step in range(1, 11):
        g = CLIP * gradient_of(5000, step).double()
        g[:100] = 0
        update = torch.sign(BETAS[0] * momentum + (1 - BETAS[0]) * g)
        parameter = parameter - LR * (update + DECAY * parameter)
        momentum = BETAS[1] * momentum + (1 - BETAS[1]) * g
    assert_close(region.full().double(), parameter, bound, 10 * LR)
    assert_close(region.state("exp_avg").double(), momentum, bound, 0.01 * CLIP)


@pytest.mark.parametrize(
    ("kind", "gradient", "bound"), [(K.IN_PLACE_FP64, K.FP64, 1e-12), (K.SPLIT_BF16, K.FP32, 1e-6)]
)
def test_lamb_is_its_formula(kind, gradient, bound, path):
    """You et al. 2020, algorithm 2, written out in fp64, one parameter of several partial blocks."""
    numel = 3 * K.PARTIAL_NUMEL + 5
    region = Region(K.LAMB, K.STATES_FP32, kind, gradient, numel)
    p = initial(numel).to(region.full().dtype).double()
    m, v = torch.zeros(2, numel, dtype=torch.float64)
    for step in range(1, 6):
        region.step = step
        region.tensors["gradient"].copy_(gradient_of(numel, step))
        region.do(region.command(K.PREPARE))
        squares = region.tensors["result"].view(-1, 2).sum(0)

        g = CLIP * gradient_of(numel, step).double()
        m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
        direction = (m / (1 - BETAS[0] ** step)) / ((v / (1 - BETAS[1] ** step)).sqrt() + EPS) + DECAY * p
        assert_close(squares, torch.stack([p.square().sum(), direction.square().sum()]), bound, 0)

        ratio = math.sqrt(squares[0] / squares[1])
        region.do(region.command(trust_ratio=ratio))
        p = p - LR * p.norm() / direction.norm() * direction
    assert_close(region.full().double(), p, bound, 10 * LR)


def test_lamb_needs_no_eps_beyond_its_elements(path):
    """With eps 0 the direction of what lies around a run would be 0 / 0; the run's own norms are numbers."""
    region = Region(K.LAMB, K.STATES_FP32, K.IN_PLACE_FP32, K.FP32, 1000, 37, 991)
    region.tensors["gradient"].copy_(gradient_of(1000, 1))
    region.step = 1
    region.do(region.command(K.PREPARE, eps=0.0))
    direction = gradient_of(1000, 1).sign() + DECAY * initial(1000)  # Adam's first step without eps
    exact = torch.stack([initial(1000)[37:991].square().sum(), direction[37:991].square().sum()])
    assert_close(region.tensors["result"], exact, 1e-5, 0)


@pytest.mark.parametrize("gradient", [K.FP32, K.BF16, K.FP16, K.FP64])
def test_norm_is_fsum(gradient, path):
    """Sums of squares a partial block, of a run that begins and ends inside blocks, to fp64's last digits."""
    first, last = 1000, 4 * K.PARTIAL_NUMEL - 77
    kind = K.IN_PLACE_FP64 if gradient == K.FP64 else K.SPLIT_BF16
    region = Region(K.ADAMW, K.STATES_FP32, kind, gradient, 5 * K.PARTIAL_NUMEL, first, last)
    values = region.tensors["gradient"].copy_(1e3 * gradient_of(region.numel, 1))
    region.do(region.command(K.NORM), cuts=[2 * K.PARTIAL_NUMEL])
    for block in range(4):
        inside = slice(max(block * K.PARTIAL_NUMEL, first), min((block + 1) * K.PARTIAL_NUMEL, last))
        exact = math.fsum(x * x for x in values[inside].double().tolist())
        assert math.isclose(region.tensors["result"][block], exact, rel_tol=1e-14)
    assert region.tensors["result"][4] == 0  # beyond the command


@pytest.mark.parametrize("gradient", [K.FP32, K.BF16])
def test_norm_keeps_inf_and_nan(gradient, path):
    """One bad element shows in its block and in no other; what is too large for fp32's squares is finite."""
    region = Region(K.ADAMW, K.STATES_FP32, K.SPLIT_BF16, gradient, 4 * K.PARTIAL_NUMEL)
    values = region.tensors["gradient"].fill_(1e30)
    values[3], values[K.PARTIAL_NUMEL + 4000] = math.inf, math.nan
    region.do(region.command(K.NORM))
    sums = region.tensors["result"][:4].tolist()
    assert sums[0] == math.inf and math.isnan(sums[1])
    assert math.isclose(sums[2], K.PARTIAL_NUMEL * values[0 + 1].double().item() ** 2, rel_tol=1e-12)


@pytest.mark.parametrize("gradient", [K.FP32, K.BF16, K.FP16, K.FP64])
def test_accumulate_is_torch(gradient, path):
    """Stored, then added to: the bits of torch's conversion and sum."""
    kind = K.IN_PLACE_FP64 if gradient == K.FP64 else K.IN_PLACE_FP32
    region = Region(K.ADAMW, K.STATES_FP32, kind, gradient, 1000, 3, 901)
    before = region.full()
    for step, flags in ((1, K.STORE), (2, 0), (3, 0)):
        region.tensors["gradient"].copy_(gradient_of(1000, step))
        region.do(region.command(K.ACCUMULATE, flags=flags), cuts=[17, 500])
        old = torch.zeros_like(before) if flags else before
        before[3:901] = (old + region.tensors["gradient"])[3:901]
        assert torch.equal(region.full(), before)


def test_16_bit_gradients_widen_as_in_torch(path):
    """Every bf16 and every fp16 there is, subnormals, infinities and NaNs included."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    for gradient in (K.BF16, K.FP16):
        region = Region(K.ADAMW, K.STATES_FP32, K.IN_PLACE_FP32, gradient, bits.numel())
        region.tensors["gradient"].view(torch.int16).copy_(bits)
        region.do(region.command(K.ACCUMULATE, flags=K.STORE))
        expected = bits.view(GRADIENTS[gradient]).float()
        assert torch.equal(region.full().isnan(), expected.isnan())
        assert torch.equal(region.full().nan_to_num(1), expected.nan_to_num(1))


@pytest.mark.parametrize("kind", [K.SPLIT_BF16, K.MASTER_BF16, K.MASTER_FP16])
def test_parameters_round_as_in_torch(kind, path):
    """A step of length zero: ties, subnormals, overflow, infinities and NaNs, and a million random bit patterns."""
    special = [
        [0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FFFFFFF, 0x7FC00000, 0x7FFF8000, 0x00000001, 0x007FFFFF],
        [0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001],  # about a tie of bf16
        [0x477FEFFF, 0x477FF000, 0x387FFFFF, 0x38800000, 0x33000000, 0x33000001],  # the ends of fp16
    ]
    special = torch.tensor(sum(special, []))
    random = torch.randint(-(2**31), 2**31, (2**20,), generator=torch.Generator().manual_seed(0))
    small = torch.randint(0x32800000, 0x48000000, (2**18,), generator=torch.Generator().manual_seed(1))
    bits = torch.cat([special, special - 2**31, random, small]).to(torch.int32)
    region = Region(K.ADAMW, K.STATES_FP32, kind, K.FP32, bits.numel())
    region.load(bits.view(torch.float32))
    region.do(region.command(lr=0.0))
    full, rounded = region.full(), region.tensors["parameter"].float()
    nan = bits.view(torch.float32).isnan()
    assert torch.equal(full.view(torch.int32)[~nan], bits[~nan]) and full[nan].isnan().all()
    assert rounded[nan].isnan().all()
    if kind == K.SPLIT_BF16:  # ties away from zero: all of them lie one upwards of truncation
        expected = ((bits.long() + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
    else:
        expected = bits.view(torch.float32).to(LOW_PRECISION[kind])
    assert torch.equal(rounded[~nan], expected[~nan].float())


# --- bits: paths, cuts, kinds, the reference -------------------------------------------------------------------------


def stepped(case: tuple, path: bytes = BEST, cuts=(), execute=None, numel: int = 9001, first=None, last=None) -> bytes:
    LIBRARY.zl_use(path)
    region = Region(*case, numel, 256 if first is None else first, 8963 if last is None else last)
    region.run(3, cuts, execute)
    LIBRARY.zl_use(BEST)
    return region.bytes()


@pytest.mark.parametrize("rule", RULES, ids=["adam", "adamw", "lion", "lamb"])
@pytest.mark.parametrize("states", STATES, ids=["fp32", "bf16", "int8"])
def test_paths_and_reference_agree_to_the_bit(rule, states):
    """Every instruction set and plain torch, from odd addresses; nothing outside the run is touched."""
    for case in (case for case in ALL_KINDS if case[:2] == (rule, states)):
        expected = stepped(case, b"plain", execute=reference.execute)
        for each in PATHS:
            assert stepped(case, each) == expected, (each, case)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_cuts_change_no_bit(data):
    """A run that starts and ends anywhere, cut anywhere: the same bytes as in one piece."""
    case = data.draw(st.sampled_from(ALL_KINDS))
    grid = K.BLOCK_NUMEL if case[1] == K.STATES_INT8 else 1
    first = data.draw(st.integers(0, 40)) * grid
    last = data.draw(st.integers(first + 1, 9001))
    cuts = sorted(cut // grid * grid for cut in data.draw(st.lists(st.integers(0, 9000), max_size=6)))
    path = data.draw(st.sampled_from(PATHS))
    whole = stepped(case, path, first=first, last=last)
    assert stepped(case, path, cuts, first=first, last=last) == whole


def test_cuts_of_norms_change_no_bit():
    """Partial sums do not depend on which thread computed them, nor on the path; the reference has the same."""
    results = set()
    for gradient, each in itertools.product([K.BF16], PATHS):
        for cuts in ([], [4096], [4096, 8192, 12288]):
            LIBRARY.zl_use(each)
            region = Region(K.ADAMW, 0, K.SPLIT_BF16, gradient, 15000, 11, 14999)
            region.tensors["gradient"].copy_(gradient_of(15000, 1))
            region.do(region.command(K.NORM), cuts)
            results.add(region.bytes())
    region.tensors["result"].zero_()
    region.do(region.command(K.NORM), execute=reference.execute)
    LIBRARY.zl_use(BEST)
    assert results == {region.bytes()}


@pytest.mark.parametrize("states", STATES, ids=["fp32", "bf16", "int8"])
def test_a_split_master_is_the_fp32_master(states):
    """However it is kept, the parameter has the same 32 bits; the bf16 half is the nearest one."""
    regions = [Region(K.ADAMW, states, kind, K.BF16, 5000) for kind in FP32_KINDS]
    for region in regions:
        region.run(10)
        assert torch.equal(region.full(), regions[0].full())
    split, master = regions[1].tensors["parameter"].float(), regions[2].tensors["parameter"].float()
    assert ((split - regions[0].full()).abs() <= (master - regions[0].full()).abs()).all()


def test_accumulate_and_fill_of_the_reference():
    """The two operations that the rules above do not reach."""
    for gradient in GRADIENTS:
        kind = K.IN_PLACE_FP64 if gradient == K.FP64 else K.IN_PLACE_FP32
        pair = [Region(K.ADAMW, K.STATES_FP32, kind, gradient, 1000, 3, 901) for _ in range(2)]
        for region, execute in zip(pair, (None, reference.execute), strict=True):
            region.tensors["gradient"].copy_(gradient_of(1000, 1))
            for flags in (K.STORE, 0):
                region.do(region.command(K.ACCUMULATE, flags=flags), execute=execute)
            region.do(region.command(K.FILL, numel=800, first=5, last=800), execute=execute)
        assert pair[0].bytes() == pair[1].bytes()


def test_fill_writes_zeros_there_and_nowhere_else():
    """Bytes [first, last) of a range, cut by the caller."""
    region = Region(K.ADAMW, K.STATES_FP32, K.IN_PLACE_FP32, K.FP32, 1000)
    region.tensors["gradient"].fill_(1)
    expected = region.arena.copy()
    start = region.offsets["gradient"]
    expected[start + 5 : start + 999] = 0
    region.do(region.command(K.FILL, numel=4000, first=5, last=999), cuts=[64, 100])
    assert region.bytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({"op": 9}, 1),
        ({"rule": 0}, 1),
        ({"rule": 5}, 1),
        ({"op": K.PREPARE}, 1),  # of a rule that is not LAMB
        ({"states": 3}, 1),
        ({"gradient_dtype": 4}, 1),
        ({"gradient_dtype": K.FP64}, 1),
        ({"parameter_kind": 5}, 1),
        ({"parameter_kind": K.IN_PLACE_FP64}, 1),
        ({"file": 1}, 2),
        ({"states": K.STATES_INT8, "first": 64}, 3),
        ({"states": K.STATES_INT8, "position": 0}, 3),  # the range below cuts a block
    ],
)
def test_what_is_unknown_is_refused(changes, answer):
    """An answer that is not 0, and not one byte written."""
    region = Region(K.ADAMW, K.STATES_FP32, K.MASTER_BF16, K.BF16, 1000)
    before = region.bytes()
    assert LIBRARY.zl_execute(region.arena.ctypes.data, region.command(**changes), 0, 300) == answer
    assert region.bytes() == before


def test_unknown_paths_are_refused():
    """And the path stays."""
    assert LIBRARY.zl_use(b"mmx") != 0 and LIBRARY.zl_path() == BEST


# --- states of low precision -----------------------------------------------------------------------------------------


def kept_after_one_step(states: int, exp_avg: torch.Tensor, seed: int, position: int = 0) -> tuple[torch.Tensor, ...]:
    """exp_avg and its square, rounded by a step that gives just these moments: betas 0, gradient exp_avg."""
    region = Region(K.ADAMW, states, K.IN_PLACE_FP32, K.FP32, exp_avg.numel())
    region.tensors["gradient"].copy_(exp_avg)
    region.do(region.command(beta1=0.0, beta2=0.0, multiplier=1.0, seed=seed, position=position))
    return region.state("exp_avg"), region.state("exp_avg_sq")


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([a, b]))[0, 1].abs().item()


@pytest.mark.parametrize("states", [K.STATES_BF16, K.STATES_INT8], ids=["bf16", "int8"])
def test_stochastic_rounding_is_unbiased(states):
    """The mean of many roundings is the number itself, of momentum and variance, within four standard errors; errors
    of neighbours, of the two states and of two steps are unrelated."""
    numel = 2**17
    values = torch.linspace(0.2, 0.99, 64).repeat(numel // 64)
    values[::128] = 1.0  # the largest of each block
    errors = []
    for seed in range(8):
        kept = kept_after_one_step(states, values, seed)
        errors.append([(kept[0] - values).double(), (kept[1] - values * values).double()])
    for which in range(2):
        error = torch.stack([each[which] for each in errors]).view(8, -1, 64)[:, :, 1:]
        error = error.transpose(0, 2).flatten(1)  # (63 values, samples)
        standard = error.std(1) / math.sqrt(error.shape[1])
        assert (error.std(1) > 0).any()
        assert (error.mean(1).abs() <= 4 * standard + 1e-6).all(), (error.mean(1) / standard).abs().max()
    bound = 5 / math.sqrt(numel)
    first, second = errors[0]
    assert correlation(first, second) < bound and correlation(first, errors[1][0]) < bound
    assert correlation(first[:-1], first[1:]) < bound and correlation(second[:-1], second[1:]) < bound


@pytest.mark.parametrize("states", [K.STATES_BF16, K.STATES_INT8], ids=["bf16", "int8"])
def test_stochastic_rounding_depends_on_place_and_seed_alone(states):
    """The same seed and place in the bucket round alike, wherever a region starts; another seed rounds otherwise."""
    values = torch.rand(1024, generator=torch.Generator().manual_seed(0))
    whole = kept_after_one_step(states, values, seed=5)[0]
    half = kept_after_one_step(states, values[512:].clone(), seed=5, position=512)[0]
    assert torch.equal(whole[512:], half)
    assert not torch.equal(whole, kept_after_one_step(states, values, seed=6)[0])


def requantised(name: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and what they stand for."""
    codes, scales = torch.zeros(x.numel(), dtype=torch.uint8), torch.zeros(-(-x.numel() // K.BLOCK_NUMEL))
    getattr(LIBRARY, f"zl_encode_{name}")(x.data_ptr(), codes.data_ptr(), scales.data_ptr(), x.numel())
    out = torch.zeros_like(x)
    getattr(LIBRARY, f"zl_decode_{name}")(codes.data_ptr(), scales.data_ptr(), out.data_ptr(), x.numel())
    return codes, scales, out


FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=150, deadline=None)
@given(st.lists(FINITE, min_size=1, max_size=300), st.sampled_from(["exp_avg", "exp_avg_sq"]), st.sampled_from(PATHS))
def test_a_checkpoint_of_int8_states_is_exact(values, name, path):
    """What codes stand for gives the same codes and scales again: zeros, subnormals and huge numbers too."""
    x = torch.tensor(values)
    x = x.abs() if name == "exp_avg_sq" else x
    LIBRARY.zl_use(path)
    codes, scales, out = requantised(name, x)
    again, scales_again, _ = requantised(name, out)
    LIBRARY.zl_use(BEST)
    assert torch.equal(codes, again) and torch.equal(scales, scales_again)
    pair = reference.encode_exp_avg_sq(x) if name == "exp_avg_sq" else reference.encode_exp_avg(x)
    assert torch.equal(codes, pair[0].view(torch.uint8)) and torch.equal(scales, pair[1])
    assert torch.equal(getattr(reference, f"decode_{name}")(*pair), out)
    if name == "exp_avg_sq":
        for block, decoded in zip(x.split(K.BLOCK_NUMEL), out.split(K.BLOCK_NUMEL), strict=True):
            assert (decoded > 0).all() if block.max() > 0 else (decoded == 0).all()


def test_int8_states_are_as_precise_as_they_say():
    """Half a step of the momentum, at most 1/64 of the block's largest; 1/32 of a variance within 15 octaves."""
    generator = torch.Generator().manual_seed(0)
    m = torch.randn(2**16, generator=generator) * torch.logspace(-12, 12, 2**16)
    largest = m.view(-1, K.BLOCK_NUMEL).abs().amax(1, keepdim=True)
    error = (requantised("exp_avg", m)[2] - m).view(-1, K.BLOCK_NUMEL).abs() / largest
    assert error.max() <= 1 / 64 and error.mean() < 1 / 300
    v = torch.rand(2**16, generator=generator) + 1e-4
    assert ((requantised("exp_avg_sq", v)[2] - v).abs() / v).max() <= 1 / 31


def test_trained_int8_states_survive_a_checkpoint():
    """States as training leaves them, through fp32 and back: every byte."""
    region = Region(K.ADAMW, K.STATES_INT8, K.SPLIT_BF16, K.BF16, 5000)
    region.run(5)
    for name in ("exp_avg", "exp_avg_sq"):
        codes, scales, _ = requantised(name, region.state(name))
        assert torch.equal(codes, region.tensors[name]) and torch.equal(scales, region.tensors[f"{name}_scale"])


def test_a_bad_block_stays_visible():
    """Inf or NaN in a block of int8 states: the block reads as NaN, its neighbours do not."""
    for bad, name in itertools.product((math.inf, math.nan), ("exp_avg", "exp_avg_sq")):
        x = torch.ones(3 * K.BLOCK_NUMEL)
        x[130] = bad
        out = requantised(name, x)[2].view(3, -1)
        assert out[1].isnan().all() and (out[0] == 1).all() and (out[2] == 1).all()


@pytest.mark.parametrize("states", [K.STATES_BF16, K.STATES_INT8], ids=["bf16", "int8"])
def test_low_precision_states_learn_as_well(states):
    """A noisy regression with inputs of very different sizes, 400 steps: the held-out loss is within 1 % of fp32's."""
    generator = torch.Generator().manual_seed(0)
    size = torch.logspace(-1, 1, 64)
    hidden = torch.randn(64, 16, generator=generator) / 8 / size[:, None]
    inputs = torch.randn(6000, 64, generator=generator) * size
    targets = torch.tanh(inputs @ hidden) + 0.1 * torch.randn(6000, 16, generator=generator)

    def loss_with(states: int) -> float:
        shapes = [(64, 64), (64, 16)]
        region = Region(K.ADAMW, states, K.IN_PLACE_FP32, K.FP32, sum(a * b for a, b in shapes))
        start = torch.randn(region.numel, generator=torch.Generator().manual_seed(1)) * 0.05
        region.load(start)

        def loss(which: slice) -> tuple[torch.Tensor, torch.Tensor]:
            flat = region.full().requires_grad_()
            first, second = (w.view(s) for w, s in zip(flat.split([a * b for a, b in shapes]), shapes, strict=True))
            output = torch.tanh(inputs[which] @ first) @ second
            return (output - targets[which]).square().mean(), flat

        for step in range(400):
            value, flat = loss(slice(step * 250 % 5000, step * 250 % 5000 + 250))
            region.tensors["gradient"].copy_(torch.autograd.grad(value, flat)[0])
            region.step += 1
            region.do(region.command(multiplier=1.0, beta2=0.999, lr=3e-3 * (1 - step / 400), weight_decay=0.0,
                                     bias_correction2_sqrt=math.sqrt(1 - 0.999**region.step)))  # fmt: skip
        return loss(slice(5000, 6000))[0].item()

    assert loss_with(states) <= 1.01 * loss_with(K.STATES_FP32)


# --- the library -----------------------------------------------------------------------------------------------------


def test_a_worker_loads_in_milliseconds():
    """What a worker process does: no torch, no numpy, no zerolite, and no time to speak of."""
    code = """
import sys, time
start = time.perf_counter()
from zerolite_kernels import cpu
library = cpu.load()
took = time.perf_counter() - start
assert library.zl_path() in (b"avx512", b"avx2", b"plain")
assert not {"torch", "numpy", "zerolite"} & set(sys.modules), sorted(sys.modules)
print(took)
"""
    took = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(took) < 0.1


def test_threads_share_a_command():
    """Calls release the GIL and hold no state: four threads on parts of one command give the bytes of one call."""
    from concurrent.futures import ThreadPoolExecutor

    regions = [Region(K.ADAMW, K.STATES_INT8, K.SPLIT_BF16, K.BF16, 2**18) for _ in range(2)]
    for region in regions:
        region.step = 1
        region.tensors["gradient"].copy_(gradient_of(region.numel, 1))
    regions[0].do(regions[0].command())
    command, base, part = regions[1].command(), regions[1].arena.ctypes.data, 2**14
    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(lambda i: LIBRARY.zl_execute(base, command, i * part, (i + 1) * part), range(16))
        assert list(answers) == [0] * 16
    assert regions[0].bytes() == regions[1].bytes()


def test_plain_pointers_and_addresses_that_wrap():
    """Base 0 means pointers; element 0 may lie outside memory, as long as the range does not."""
    region = Region(K.ADAMW, K.STATES_FP32, K.IN_PLACE_FP32, K.FP32, 1000)
    region.tensors["gradient"].copy_(gradient_of(1000, 1))
    expected = Region(K.ADAMW, K.STATES_FP32, K.IN_PLACE_FP32, K.FP32, 1000)
    expected.tensors["gradient"].copy_(gradient_of(1000, 1))
    expected.do(expected.command())
    shift = 10**6  # element 0 lies this many elements before the tensors
    addresses = {
        name: (tensor.data_ptr() - shift * tensor.element_size()) % 2**64 for name, tensor in region.tensors.items()
    }
    command = region.command(numel=shift + 1000, first=shift, last=shift + 1000, **addresses)
    assert LIBRARY.zl_execute(None, command, 0, 2**63) == 0
    assert region.bytes() == expected.bytes()
    assert ctypes.sizeof(command) == LIBRARY.zl_command_bytes()
