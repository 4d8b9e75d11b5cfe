"""LoRA's autograd function on the CPU: the numbers of PEFT and fp64, whatever the shapes, dtypes and surroundings."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from lora_layers import SCALE, error, error_ratios, layer, masks, peft_layers, peft_results
from torch.utils.checkpoint import checkpoint
from zerolite_kernels.lora import lora_linears, reference

SHAPES = [(9, 41, 341), (41, 341, 9), (341, 9, 41), (41, 4231, 9), (4231, 9, 41), (9, 41, 4231)]  # M, K, N
DROPOUTS = [0.0, 0.05]


def equal(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("dropout", DROPOUTS)
@pytest.mark.parametrize("M, K, N", [(9, 41, 341), (41, 341, 9), (64, 256, 128)])
def test_outputs_and_gradients_are_those_of_peft(M, K, N, dropout, n):
    """fp32, to 1e-6 of each tensor's norm, with our masks replayed in PEFT's layers."""
    pytest.importorskip("peft")
    given = layer((M, K), N, r=8, n=n)
    outputs = given.ours(dropout)
    modules = peft_layers(given, dropout, masks(outputs))
    ours, theirs = given.results(outputs), peft_results(given, modules)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype
        assert error(ours[name], expected) < 1e-6, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dropout", DROPOUTS)
@pytest.mark.parametrize("M, K, N", SHAPES)
def test_error_against_fp64_is_at_most_that_of_plain_torch(M, K, N, dropout, dtype):
    """At most 1.2 times, per tensor, in the same precision and with the same masks."""
    ratios = error_ratios((M, K), N, 9, dropout, dtype=dtype)
    assert max(ratios.values()) <= 1.2, ratios


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("n", [1, 3, 4])
def test_gradcheck(dropout, n):
    """Every gradient is the derivative of the outputs, in fp64."""
    given = layer((2, 5, 11), 7, r=3, n=n, dtype=torch.float64)

    def run(x, *adapters):
        torch.manual_seed(3)
        return lora_linears(x, given.weights, given.biases, adapters[::2], adapters[1::2], SCALE, dropout)

    assert torch.autograd.gradcheck(run, tuple(given.leaves.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dropout", DROPOUTS)
def test_reruns_are_bit_identical(dropout, dtype):
    """The same seed gives the same bits, another one other masks."""
    given = layer((341, 41), 9, r=4, dtype=dtype)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(given.results(given.ours(dropout)))
    assert equal(runs[0], runs[1])
    assert equal(runs[0], runs[2]) == (dropout == 0)


# --- masks -----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@drawn(st.integers(0, 5), st.integers(1, 70), st.integers(0, 2**32))
def test_bits_are_unpacked_as_they_were_packed(rows, width, seed):
    """Bit j of byte b is element 8 b + j, whatever the width."""
    keep = torch.randint(2, (rows, -(-width // 8) * 8), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    bits = reference.pack_bits(keep)
    for row in range(rows):
        number = int.from_bytes(bytes(bits[row].tolist()), "little")
        assert [number >> i & 1 for i in range(width)] == keep[row, :width].tolist()
    assert torch.equal(reference.unpack_bits(bits, width), keep[:, :width])


@pytest.mark.parametrize("dropout", [0.05, 0.5, 0.9])
def test_masks_keep_at_the_given_rate_and_are_independent(dropout):
    """Rates within five standard deviations; the three masks, and neighbours in each, are uncorrelated."""
    torch.manual_seed(0)
    keeps = torch.stack(masks(layer((1000, 1000), 1, r=1).ours(dropout))).double()
    numel, deviation = keeps[0].numel(), (dropout * (1 - dropout)) ** 0.5
    for keep in keeps:
        assert abs(keep.mean() - (1 - dropout)) < 5 * deviation * numel**-0.5
    centred = (keeps - (1 - dropout)) / deviation
    pairs = [(centred[i], centred[j]) for i, j in [(0, 1), (0, 2), (1, 2)]]
    pairs += [(c[:, 1:], c[:, :-1]) for c in centred] + [(c[1:], c[:-1]) for c in centred]
    for left, right in pairs:
        assert abs((left * right).mean()) < 5 * numel**-0.5


def test_a_dropout_of_almost_one_drops_everything():
    """The threshold that rounds to 2^16 does not wrap around."""
    given = layer((9, 41), 5, r=2)
    outputs = given.ours(1 - 2**-20)
    assert not any(keep.any() for keep in masks(outputs))
    base = torch.nn.functional.linear(given.x, given.weights[0], given.biases[0])
    torch.testing.assert_close(outputs[0], base)


# --- surroundings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", DROPOUTS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_bits(dropout, use_reentrant):
    """The recomputed forward draws the masks of the first one."""
    given = layer((3, 41, 9), 11, r=2)

    def run(x, *adapters):
        return lora_linears(x, given.weights, given.biases, adapters[::2], adapters[1::2], SCALE, dropout)

    def results(forward):
        torch.manual_seed(5)
        leaves = list(given.leaves.values())
        outputs = forward(*leaves)
        torch.randn(3)  # what another layer draws before backward
        torch.autograd.backward(outputs, given.dys)
        grads = {name: leaf.grad for name, leaf in given.leaves.items()}
        for leaf in leaves:
            leaf.grad = None
        return grads | {f"y{i}": y.detach() for i, y in enumerate(outputs)}

    assert equal(results(run), results(lambda *leaves: checkpoint(run, *leaves, use_reentrant=use_reentrant)))


@pytest.mark.parametrize("dropout", DROPOUTS)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x,
        lambda x: x.transpose(0, 1),
        lambda x: x[:, ::2],
        lambda x: x[..., 1:],
        lambda x: x.mT.contiguous().mT,
        lambda x: x[:1].expand(6, -1, -1),
        lambda x: x[0, 0],
        lambda x: x[None],
        lambda x: x[:0],
    ],
    ids=[
        "whole",
        "transposed",
        "every other",
        "cut",
        "columns first",
        "expanded",
        "one row",
        "four dimensions",
        "no row",
    ],
)
def test_inputs_and_weights_may_be_strided(view, dropout):
    """Views, transposed weights (GPT-2's Conv1D) and expanded gradients give what plain torch gives."""
    data = torch.randn(4, 6, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shape = view(data).shape
    given = layer(tuple(shape), 7, r=3, dtype=torch.float64)
    given.x = view(data).requires_grad_()
    given.weights = [weight.t().contiguous().t() for weight in given.weights]
    given.dys[1] = torch.ones((), dtype=torch.float64).expand(*shape[:-1], 7)
    outputs = given.ours(dropout)
    expected = given.results(given.plain(dropout, masks(outputs)))
    for name, actual in given.results(outputs).items():
        torch.testing.assert_close(actual, expected[name], rtol=1e-12, atol=1e-12)


def test_outputs_may_be_written_in_place():
    """As a model does that scales its queries; and an output that is not used is no error."""
    given = layer((2, 9, 41), 7, r=3, dtype=torch.float64)
    q, k, _ = given.ours(0.0)
    q *= 3
    q.add_(k)
    q0, k0, _ = given.plain(0.0, [None] * 3)
    leaves = [given.x, given.As[0], given.Bs[1]]
    actual, expected = torch.autograd.grad(q.sum(), leaves), torch.autograd.grad((3 * q0 + k0).sum(), leaves)
    torch.testing.assert_close(actual, expected)


def test_use_twice_in_one_graph_adds_up():
    """The second layer's input is the first one's output; its adapters are shared."""
    given = layer((9, 11), 11, r=3, n=1, dtype=torch.float64)

    def grads(forward):
        (y,) = forward()
        given_x, given.x = given.x, y
        (z,) = forward()
        given.x = given_x
        return torch.autograd.grad(z, list(given.leaves.values()), given.dys)

    torch.testing.assert_close(grads(lambda: given.ours(0.0)), grads(lambda: given.plain(0.0, [None])))


@pytest.mark.parametrize("dropout", DROPOUTS)
@pytest.mark.parametrize("trains", ["A0 B0", "x", "x A1", "B0 B2", "A2", ""])
def test_only_what_requires_a_gradient_has_one(trains, dropout):
    """An input without gradient, frozen A or B: the others' gradients are what they are with all of them."""
    given = layer((9, 41), 7, r=3, dtype=torch.float64)
    torch.manual_seed(1)
    expected = given.results(given.ours(dropout))
    for name, leaf in given.leaves.items():
        leaf.requires_grad_(name in trains.split())
    torch.manual_seed(1)
    outputs = given.ours(dropout)
    assert all(torch.equal(y, expected[f"y{i}"]) for i, y in enumerate(outputs))
    assert outputs[0].requires_grad == bool(trains)
    if trains:
        torch.autograd.backward(outputs, given.dys)
    for name, leaf in given.leaves.items():
        if name in trains.split():
            torch.testing.assert_close(leaf.grad, expected[f"d{name}"])
        else:
            assert leaf.grad is None


def test_without_gradients_nothing_is_saved():
    """Under no_grad the outputs are the same, and hold no graph."""
    given = layer((9, 41), 7, r=3)
    with torch.no_grad():
        outputs = given.ours(0.0)
    assert not outputs[0].requires_grad
    assert torch.equal(outputs[0], given.ours(0.0)[0])


@pytest.mark.parametrize("dropout", DROPOUTS)
def test_adapters_in_fp32_on_a_base_in_bf16(dropout):
    """They are used in bf16; their gradients come in fp32."""
    given = layer((41, 341), 9, r=3, dtype=torch.bfloat16)
    wide = given.to(torch.bfloat16)
    wide.As, wide.Bs = ([t.detach().float().requires_grad_() for t in ts] for ts in (given.As, given.Bs))
    runs = []
    for each in (given, wide):
        torch.manual_seed(2)
        runs.append(each.results(each.ours(dropout)))
    for name, actual in runs[1].items():
        assert actual.dtype == (torch.float32 if name[:2] in ("dA", "dB") else torch.bfloat16)
        torch.testing.assert_close(actual, runs[0][name], check_dtype=False, rtol=2**-8, atol=0)


def test_autocast_computes_in_its_dtype():
    """Forward and backward inside and outside of autocast give what tensors cast beforehand give."""
    given = layer((9, 41), 7, r=3)
    cast = given.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = given.ours(0.0)
        grads = torch.autograd.grad(outputs, list(given.leaves.values()), cast.dys)
    expected = cast.results(cast.ours(0.0))
    assert all(torch.equal(y, expected[f"y{i}"]) for i, y in enumerate(outputs))
    for name, grad in zip(given.leaves, grads, strict=True):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, expected[f"d{name}"].float(), rtol=2**-8, atol=0)


def trains(tensors):
    return [t.detach().requires_grad_() for t in tensors]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda g: setattr(g, "weights", trains(g.weights)), "weight 0 requires a gradient"),
        (lambda g: setattr(g, "biases", trains(g.biases)), "bias 0 requires a gradient"),
        (lambda g: g.As.__setitem__(1, g.As[1][:2]), r"A 1 should be \(3, 41\).* got \(2, 41\)"),
        (lambda g: g.Bs.__setitem__(2, g.Bs[2][:, :2]), r"B 2 should be \(7, 3\).* got \(7, 2\)"),
        (lambda g: g.weights.__setitem__(0, g.weights[0].t()), r"weight 0 should be \(41, 41\).* got \(41, 7\)"),
        (lambda g: g.biases.__setitem__(0, g.biases[0][1:]), r"bias 0 should be \(7,\).* got \(6,\)"),
        (
            lambda g: g.weights.__setitem__(1, g.weights[1].double()),
            "weight 1 is torch.float64, but x is torch.float32",
        ),
        (lambda g: setattr(g, "As", [a.new_zeros(257, 41) for a in g.As]), "the rank is 1 to 256, got 257"),
        (lambda g: g.biases.pop(), "3 weights, 2 biases, 3 As, 3 Bs"),
    ],
)
def test_refusals(change, message):
    """What cannot be computed is refused by name, with what was expected and what came."""
    given = layer((9, 41), 7, r=3)
    change(given)
    with pytest.raises(ValueError, match=message):
        given.ours(0.0)


def test_refuses_a_dropout_of_one():
    """No division by zero."""
    with pytest.raises(ValueError, match="less than 1, got 1.0"):
        layer((9, 41), 7, r=3).ours(1.0)
