"""The host kernels against torch.optim, formulas in fp64 and torch's conversions; and every path, cut and reference
against each other, bit by bit."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from regions import (
    BEST,
    BETAS,
    CLIP,
    DECAY,
    EPS,
    GRADIENTS,
    LIBRARY,
    LOW_PRECISION,
    LR,
    PATHS,
    Region,
    gradient_of,
    initial,
)
from zerolite_kernels.cpu import command as K
from zerolite_kernels.cpu import reference

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the host kernels were not built: no C++ compiler at install")

RULES = [K.ADAM, K.ADAMW, K.LION, K.LAMB]
STATES = [K.STATES_FP32, K.STATES_BF16, K.STATES_INT8]
FP32_KINDS = [K.IN_PLACE_FP32, K.SPLIT_BF16, K.MASTER_BF16, K.MASTER_FP16]
ALL_KINDS = [
    (rule, states, kind, gradient)
    for rule, states, kind, gradient in itertools.product(RULES, STATES, range(5), GRADIENTS)
    if (kind == K.IN_PLACE_FP64) == (gradient == K.FP64) and not (gradient == K.FP64 and states)
]


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
