"""The output layer with its cross-entropy: the numbers of plain torch, a small part of its memory."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import weakref
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from zerolite_kernels.loss import cross_entropy as kernels
from zerolite_kernels.loss import linear_cross_entropy

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def plain(hidden, weight, labels, bias=None, reduction="sum"):
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction=reduction)


def drawn(tokens: int, width: int, vocabulary: int, dtype=torch.float64, seed: int = 0):
    """hidden, weight and bias as leaves, and labels, a third of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (tokens, width), (vocabulary, width), (vocabulary,)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    tensors[1] *= 2 / width**0.5
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    labels[1::3] = -100
    return *(tensor.to(dtype).requires_grad_() for tensor in tensors), labels


def with_gradients(loss, *inputs, factor: float = 1.0):
    return [loss.detach(), *torch.autograd.grad(loss * factor, inputs)]


# Numbers #


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 200),
    width=st.integers(1, 9),
    vocabulary=st.integers(2, 50),
    chunk_rows=st.integers(1, 130),
    reduction=st.sampled_from(["sum", "mean"]),
    has_bias=st.booleans(),
    is_transposed=st.booleans(),
)
def test_any_shape_and_chunk_gives_what_plain_torch_does(
    tokens, width, vocabulary, chunk_rows, reduction, has_bias, is_transposed
):
    """In fp64 loss and gradients are those of F.linear and F.cross_entropy, however rows fall into chunks."""
    hidden, weight, bias, labels = drawn(tokens, width, vocabulary)
    if is_transposed:
        weight = weight.detach().T.contiguous().T.requires_grad_()
    bias = bias if has_bias else None
    inputs = [hidden, weight, *([bias] if has_bias else [])]
    actual = linear_cross_entropy(hidden, weight, labels, bias, reduction, chunk_numel=chunk_rows * vocabulary)
    expected = plain(hidden, weight, labels, bias, reduction)
    for one, other in zip(with_gradients(actual, *inputs), with_gradients(expected, *inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    *inputs, labels = drawn(5, 3, 7)
    assert torch.autograd.gradcheck(
        lambda hidden, weight, bias: linear_cross_entropy(hidden, weight, labels, bias, chunk_numel=14), inputs
    )


@pytest.mark.parametrize("factor", [1.0, 0.37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "width", "vocabulary"), [(9, 41, 341), (99, 9, 4231), (4231, 9, 41)])
def test_error_is_at_most_that_of_plain_torch(tokens, width, vocabulary, dtype, factor):
    """Against fp64, 1.4 times per tensor at most, root mean square over draws, whatever gradient comes in.

    MKL alone sums the same product 1.27 times less exactly in one layout than in the other (AVX-512).
    """
    ours, plains = [], []
    for seed in range(max(4, 60 * 9 // tokens)):  # the loss is one number a draw
        hidden, weight, bias, labels = drawn(tokens, width, vocabulary, dtype, seed)
        inputs = hidden, weight, bias
        wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
        truth = with_gradients(plain(*wide[:2], labels, wide[2]), *wide, factor=factor)
        # A block of one row of the vocabulary is a matrix-vector product, which MKL sums in one sequence.
        chunk_numel = max(64 * vocabulary, 8 * tokens)
        loss = linear_cross_entropy(hidden, weight, labels, bias, chunk_numel=chunk_numel)
        for computed, errors in (loss, ours), (plain(hidden, weight, labels, bias), plains):
            found = with_gradients(computed, *inputs, factor=factor)
            errors.append([(a.double() - b).square().sum() for a, b in zip(found, truth, strict=True)])
    ours, plains = (torch.tensor(errors).sum(0).sqrt() for errors in (ours, plains))
    assert (ours <= 1.4 * plains).all(), (ours / plains).tolist()


def test_fp16_keeps_small_gradients():
    """With the loss scaled by 2**10, as fp16 is trained, gradients keep the digits that plain torch keeps."""
    hidden, weight, _, labels = drawn(3, 8, 20_000, torch.float16)
    inputs = hidden, weight
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    truth = with_gradients(plain(*wide, labels), *wide, factor=2.0**10)
    ours = with_gradients(linear_cross_entropy(hidden, weight, labels), *inputs, factor=2.0**10)
    plains = with_gradients(plain(hidden, weight, labels), *inputs, factor=2.0**10)
    for a, b, c in zip(ours, plains, truth, strict=True):
        assert (a.double() - c).norm() <= 1.2 * (b.double() - c).norm()


def test_reruns_give_the_same_bits():
    results = []
    for _ in range(2):
        *inputs, labels = drawn(341, 9, 41, torch.bfloat16)
        loss = linear_cross_entropy(*inputs[:2], labels, inputs[2], chunk_numel=64 * 41)
        results.append(with_gradients(loss, *inputs))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_no_label_at_all():
    """As torch: the sum is 0 and its gradients are zeros, the mean is nan."""
    hidden, weight, bias, labels = drawn(4, 3, 5)
    loss, *gradients = with_gradients(
        linear_cross_entropy(hidden, weight, torch.full_like(labels, -100), bias), hidden, weight, bias
    )
    assert loss == 0 and [gradient.shape for gradient in gradients] == [(4, 3), (5, 3), (5,)]
    assert not any(gradient.any() for gradient in gradients)
    assert linear_cross_entropy(hidden[:0], weight, labels[:0], reduction="mean", ignore_index=None).isnan()


def test_extreme_logits():
    """A logit of -inf is a token that cannot be; very large ones do not overflow."""
    hidden, weight, bias, labels = drawn(6, 3, 5)
    with torch.no_grad():
        weight *= 1e4
        bias[labels[0] - 1] = -torch.inf
    expected = plain(hidden, weight, labels, bias)
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, bias), expected)


# Autograd #


def test_backward_may_be_called_again():
    """With retain_graph gradients add up, whatever came in first, and what was handed out is not written to."""
    hidden, weight, bias, labels = drawn(5, 3, 7)
    loss = linear_cross_entropy(hidden, weight, labels, bias)
    (one,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    before = one.clone()
    (loss * 3).backward(retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    assert torch.equal(one, before)
    torch.testing.assert_close(hidden.grad, 5 * before)


def test_a_second_derivative_is_refused():
    hidden, weight, _, labels = drawn(5, 3, 7)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), hidden, create_graph=True)


def saved_bytes(make) -> int:
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = make()
    return sum(sizes.values()) if loss.requires_grad else 0


def test_only_gradients_that_are_asked_for_are_made():
    """A frozen head has none, a frozen model none at all; the loss has the same bits."""
    hidden, weight, _, labels = drawn(64, 8, 500, torch.bfloat16)
    trained = linear_cross_entropy(hidden, weight, labels)
    frozen = weight.detach()
    labels[labels < 0] = 0
    inputs = hidden.numel() * 2 + frozen.numel() * 2 + 64 * 8  # they live anyway
    own = 64 * 8 * 4 + 3 * 64 * 4  # fp32: the gradient by hidden, and three numbers a row
    assert saved_bytes(lambda: linear_cross_entropy(hidden, frozen, labels, ignore_index=None)) == inputs + own
    hidden, weight, _, labels = drawn(64, 8, 500, torch.bfloat16)
    assert linear_cross_entropy(hidden, frozen, labels) == trained
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, labels)
    assert loss == trained and not loss.requires_grad and loss.dtype == torch.float32
    linear_cross_entropy(hidden.detach(), weight, labels).backward()
    assert hidden.grad is None and weight.grad.dtype == torch.bfloat16


def test_activation_checkpointing_around_it():
    hidden, weight, _, labels = drawn(9, 3, 7)
    direct = with_gradients(linear_cross_entropy(hidden, weight, labels), hidden, weight)
    again = torch.utils.checkpoint.checkpoint(linear_cross_entropy, hidden, weight, labels, use_reentrant=False)
    assert all(map(torch.equal, direct, with_gradients(again, hidden, weight)))


# Memory #


class Allocations(TorchDispatchMode):
    """Notes which storages operators make and when they die; not those that operators are given."""

    def __init__(self):
        super().__init__()
        self.notes: list[tuple[int, int]] = []  # (number of the storage, bytes that came or, negative, went)
        self.numbers = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for storage in storages_of((args, kwargs)):
            self.numbers.setdefault(storage, -1)
        result = function(*args, **(kwargs or {}))
        for storage in storages_of(result):
            if storage not in self.numbers:
                self.numbers[storage] = number = len(self.notes)
                self.notes.append((number, storage.nbytes()))
                weakref.finalize(storage, self.notes.append, (number, -storage.nbytes()))
        return result

    def peak_without(self, tensor: torch.Tensor | None) -> int:
        left_out = None if tensor is None else self.numbers[tensor.untyped_storage()]
        return max(accumulate(size for number, size in self.notes if number != left_out))


def storages_of(tree) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def peak_bytes(function, dtype, tokens: int, is_head_trained: bool) -> int:
    """Of forward and backward at LLaMA 3 8B's output layer, but for the weight's own gradient.

    On the meta device: sizes without the work. Nothing there has a value, so this also proves that none is read: no
    wait for a device.
    """
    hidden = torch.empty(tokens, 4096, dtype=dtype, device="meta", requires_grad=True)
    weight = torch.empty(128_256, 4096, dtype=dtype, device="meta", requires_grad=is_head_trained)
    labels = torch.empty(tokens, dtype=torch.int64, device="meta")
    with Allocations() as allocations:
        function(hidden, weight, labels).backward()
    return allocations.peak_without(weight.grad)


@pytest.mark.parametrize("is_head_trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [512, 2048, 16384])
def test_peak_is_a_quarter_of_the_plain_one_at_most(dtype, tokens, is_head_trained):
    ours = peak_bytes(lambda *inputs: linear_cross_entropy(*inputs, ignore_index=None), dtype, tokens, is_head_trained)
    plains = peak_bytes(plain, dtype, tokens, is_head_trained)
    print(f"{dtype} {tokens} {is_head_trained}: {ours / 2**20:.0f} of {plains / 2**20:.0f} MiB = {ours / plains:.3f}")
    assert ours <= plains / 4


@settings(deadline=None)  # a loaded machine is no bug
@given(num_rows=st.integers(0, 500), vocabulary=st.integers(1, 500), chunk_numel=st.integers(0, 60_000))
def test_chunks_cover_everything_once(num_rows, vocabulary, chunk_numel):
    """Row chunks are nearly equal, blocks of the vocabulary whole tiles; none is larger than it may be."""
    chunks = kernels.row_chunks(num_rows, vocabulary, chunk_numel)
    blocks = kernels.vocabulary_blocks(vocabulary, max(num_rows, 1), chunk_numel)
    for length, slices, row_numel in (num_rows, chunks, vocabulary), (vocabulary, blocks, max(num_rows, 1)):
        sizes = [len(range(length)[part]) for part in slices]
        assert [i for part in slices for i in range(length)[part]] == list(range(length))
        assert all(size * row_numel <= max(chunk_numel, row_numel) for size in sizes)
    sizes = [len(range(num_rows)[rows]) for rows in chunks]
    assert not sizes or sizes[-1] > sizes[0] - len(sizes)
    step = blocks[0].stop
    assert step <= kernels.TILE or step % kernels.TILE == 0


# Refusals #


def test_mistakes_are_named():
    hidden, weight, bias, labels = drawn(4, 3, 5)
    for wrong, error, text in (
        ((hidden.T, weight, labels), ValueError, r"\(3, 4\) and \(5, 3\)"),
        ((hidden, weight, labels[:3]), ValueError, r"labels \(4,\) int64"),
        ((hidden, weight, labels.int()), ValueError, "torch.int32"),
        ((hidden, weight, labels, bias[:2]), ValueError, r"bias \(5,\)"),
        ((hidden, weight.float(), labels), TypeError, "one dtype"),
        ((hidden.long(), weight.long(), labels), TypeError, "floating"),
        ((hidden, weight, labels, bias, "none"), ValueError, "'none'"),
        ((hidden, weight, labels + 5), IndexError, "labels from 0 to 4"),
    ):
        with pytest.raises(error, match=text):
            linear_cross_entropy(*wrong)


# Triton #

INTERPRETED = """
import torch
import torch.nn.functional as F
from zerolite_kernels.loss import cross_entropy, reference, triton_kernels

torch.manual_seed(0)
for dtype, scale in (torch.float32, 1.0), (torch.float16, cross_entropy.FP16_SCALE), (torch.bfloat16, 1.0):
    for rows, vocabulary in (3, 9), (9, 341), (5, 4231), (2, 20001):
        logits = (4 * torch.randn(rows, vocabulary)).to(dtype)
        logits[0, :8] = -torch.inf
        labels = torch.randint(8, vocabulary, (rows,))
        expected, actual = torch.empty(3, rows), torch.empty(3, rows)
        reference.sum_exponentials(logits, labels, *expected)
        triton_kernels.sum_exponentials(logits, labels, *actual)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
        part = logits[:, 4:].contiguous()  # of the vocabulary
        truth = reference.gradient_(part.clone(), labels - 4, *expected[1:], scale)
        found = triton_kernels.gradient_(part, labels - 4, *actual[1:], scale)
        assert found is part
        # In fp16 small ones keep their digits: 4e-9 is below its smallest number.
        rtol, atol = 2 * torch.finfo(dtype).eps, 4e-9 * scale if dtype == torch.float16 else 3e-7
        torch.testing.assert_close(found.float(), truth, rtol=rtol, atol=atol)
losses, largest, total = torch.empty(3, 2)
triton_kernels.sum_exponentials(torch.randn(2, 9), torch.tensor([9, -1]), losses, largest, total)
assert losses.isnan().all()

# All together, with the loss scaled as fp16 is trained. The interpreter cuts bf16 off where a GPU rounds it.
cross_entropy._kernels_for = lambda hidden: triton_kernels
for dtype in torch.float32, torch.float16:
    inputs = [torch.randn(shape) for shape in ((2, 41), (20001, 41), (20001,))]
    inputs = [(x / x.shape[-1] ** 0.2).to(dtype).requires_grad_() for x in inputs]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    labels = torch.randint(0, 20001, (2,))
    errors = []
    truth = torch.autograd.grad(2**10 * F.cross_entropy(F.linear(*wide), labels, reduction="sum"), wide)
    for computed in (
        cross_entropy.linear_cross_entropy(*inputs[:2], labels, inputs[2], chunk_numel=5 * 20001),
        F.cross_entropy(F.linear(*inputs).float(), labels, reduction="sum"),
    ):
        found = torch.autograd.grad(2**10 * computed, inputs)
        differences = [a.double() - b for a, b in zip(found, truth)]
        differences.append(differences[2].index_fill(0, labels, 0.0))  # of tokens that are no label: small ones
        errors.append([difference.norm() for difference in differences])
    assert all(a <= 1.2 * b for a, b in zip(*errors)), (dtype, errors)
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from zerolite_kernels.loss.triton_kernels import BLOCK, NUM_WARPS, gradient_kernel, sum_exponentials_kernel

for element in "fp32", "fp16", "bf16":
    rows = {"labels_ptr": "*i64", "losses_ptr": "*fp32", "largest_ptr": "*fp32", "total_ptr": "*fp32"}
    for kernel, names in (sum_exponentials_kernel, {"vocabulary": "i32"}), (
        gradient_kernel,
        {"num_columns": "i32", "scale": "fp32"},
    ):
        signature = {"logits_ptr": "*" + element, **rows, **names, "BLOCK": "constexpr"}
        signature = {name: signature[name] for name in kernel.arg_names}
        source = ASTSource(kernel, signature=signature, constexprs={"BLOCK": BLOCK})
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": NUM_WARPS})
        assert compiled.asm["cubin"]
"""


def run(code: str, **environment: str) -> None:
    """In a process of its own: triton decides when it is imported whether it interprets."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = {**kept, **environment}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_triton
def test_the_triton_kernel_interpreted():
    """It gives what the torch function gives, in every dtype; a label outside the vocabulary gives nan."""
    run(INTERPRETED, TRITON_INTERPRET="1")


@needs_triton
def test_the_triton_kernel_compiles_for_hopper(tmp_path):
    run(COMPILED, TRITON_CACHE_DIR=str(tmp_path))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype):
    """Triton kernel and 16-bit products: the error of plain torch against fp64, and no wait for the device."""
    *inputs, labels = (tensor.detach().cuda() for tensor in drawn(341, 64, 4231, dtype))
    inputs, labels = [tensor.requires_grad_() for tensor in inputs], labels.abs()
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    truth = with_gradients(plain(*wide[:2], labels, wide[2]), *wide)
    plains = with_gradients(plain(*inputs[:2], labels, inputs[2]), *inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = linear_cross_entropy(*inputs[:2], labels, inputs[2], ignore_index=None, chunk_numel=64 * 4231)
        ours = with_gradients(loss, *inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other, exact in zip(ours[1:], plains[1:], truth[1:], strict=True):
        assert (one.double() - exact).norm() <= 1.2 * (other.double() - exact).norm()
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=1e-2 if dtype == torch.bfloat16 else 1e-3, atol=0)
