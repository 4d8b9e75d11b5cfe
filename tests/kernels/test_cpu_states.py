"""States of low precision: rounded without bias, exact through a checkpoint, and as good to learn with as fp32's."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from regions import BEST, LIBRARY, PATHS, Region
from zerolite_kernels.cpu import command as K
from zerolite_kernels.cpu import reference

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the host kernels were not built: no C++ compiler at install")


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
