"""Output layer and cross-entropy in one: logits exist for a part of the label tokens or of the vocabulary at a time.

[Note: two walks over the logits]
Forward takes chunks of rows, each with the whole vocabulary: the loss, and, while a chunk's logits are there, the
gradient by the hidden states (the way of Liger-Kernel). A weight that trains gets its gradient in backward, from
logits computed once more, for all rows and a block of the vocabulary: each block is summed inside one matrix product,
rounded once and written once. Liger adds chunk after chunk into a whole gradient, which needs fp32 sums of the
weight's size to be as exact, and reads and writes them for every chunk: more time than the product they save.

[Note: precision of the loss]
Logits have the dtype of their factors, as the plain layer's; what follows is in fp32 (fp64 for fp64), and a gradient is
rounded after the gradient that comes in is multiplied into it. A logit's own gradient lies in [-1, 1] and is mostly
close to 0, where fp16 has no digits: in fp16 it is held times 2**15, which the fp32 products take out again.
"""

import importlib
import math
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zerolite_kernels.loss import reference

# Logits: 64 MiB in bf16; at a vocabulary of 128k 256 rows, enough work for one reading of the weight.
CHUNK_NUMEL = 2**25
NUM_CHUNKS = 8  # at least, where that leaves each a tile
TILE = 64  # rows or columns of matrix products on tensor cores
FP16_SCALE = 2.0**15


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    reduction: str = "sum",
    ignore_index: int | None = -100,
    chunk_numel: int | None = None,
) -> Tensor:
    """`F.cross_entropy(F.linear(hidden, weight, bias), labels)`, a scalar of at least fp32, without the whole logits.

    hidden (tokens, width), weight (vocabulary, width) and bias (vocabulary,) of one floating dtype, labels (tokens,)
    int64. reduction: "sum" or "mean" over the tokens whose label is not `ignore_index`; only those are multiplied. None
    says that every token has a label: then nothing waits for the device. Without labels the sum is 0 with zero
    gradients, the mean is nan, as torch has it. A label outside the vocabulary raises IndexError on the CPU; a GPU
    returns nan or stops.

    chunk_numel: most logits that exist at once; 2**25, or an eighth of them all where that is less (64 rows at least).
    Reruns give the same bits. Differentiable once. After Hsu et al. 2024, "Liger Kernel", section 3.
    """
    _check(hidden, weight, labels, bias, reduction)
    if ignore_index is not None:
        positions = (labels != ignore_index).nonzero().flatten()
        hidden, labels = hidden.index_select(0, positions), labels.index_select(0, positions)
    num_labels, vocabulary = labels.numel(), weight.shape[0]
    has_values = type(labels) is Tensor and labels.device.type == "cpu"  # a fake tensor has none
    if has_values and num_labels > 0 and not 0 <= labels.min() <= labels.max() < vocabulary:
        raise IndexError(f"expected labels from 0 to {vocabulary - 1}, got {labels.min()} to {labels.max()}")
    if chunk_numel is None:
        chunk_numel = min(CHUNK_NUMEL, max(num_labels // NUM_CHUNKS, TILE) * vocabulary)
    needs_d_hidden = torch.is_grad_enabled() and hidden.requires_grad
    loss = _LinearCrossEntropy.apply(hidden, weight, bias, labels, chunk_numel, needs_d_hidden)
    return loss if reduction == "sum" else loss / num_labels


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, reduction: str) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "expected hidden (tokens, width) and weight (vocabulary, width), "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"expected labels ({hidden.shape[0]},) int64, one a row of hidden, got {tuple(labels.shape)} {labels.dtype}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"expected bias ({weight.shape[0]},), one a row of weight, got {tuple(bias.shape)}")
    if any(tensor is not None and tensor.dtype != hidden.dtype for tensor in (weight, bias)):
        raise TypeError(f"expected hidden, weight and bias of one dtype, got {hidden.dtype} and {weight.dtype}")
    if not hidden.is_floating_point():
        raise TypeError(f"expected floating tensors, got {hidden.dtype}")
    if reduction not in ("sum", "mean"):
        raise ValueError(f'expected reduction "sum" or "mean", got {reduction!r}')


def row_chunks(num_rows: int, vocabulary: int, chunk_numel: int) -> list[slice]:
    """Chunks of rows of at most so many logits, at least a row: nearly equal ones.

    A last chunk of a row or two would be summed less exactly: MKL goes over the vocabulary in one sequence there.
    """
    longest = max(chunk_numel // vocabulary, 1)
    step = math.ceil(num_rows / max(math.ceil(num_rows / longest), 1))
    return [slice(start, start + step) for start in range(0, num_rows, max(step, 1))]


def vocabulary_blocks(vocabulary: int, row_numel: int, chunk_numel: int) -> list[slice]:
    """Blocks of the vocabulary of at most so many elements, at least a row: whole tiles, so that rows stay aligned.

    Nearly equal ones, for the same reason as in `row_chunks`: here it is the rows that MKL would sum in one sequence.
    """
    longest = max(chunk_numel // row_numel, 1)
    tile = TILE if longest >= TILE else 1
    longest -= longest % tile
    step = math.ceil(vocabulary / math.ceil(vocabulary / longest) / tile) * tile
    return [slice(start, start + step) for start in range(0, vocabulary, step)]


class _LinearCrossEntropy(torch.autograd.Function):
    """See [Note: two walks over the logits]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        chunk_numel: int,
        needs_d_hidden: bool,
    ) -> Tensor:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        ctx.scale = FP16_SCALE if hidden.dtype == torch.float16 else 1.0
        ctx.chunk_numel = chunk_numel
        losses, largest, total = torch.empty((3, labels.numel()), dtype=dtype, device=hidden.device)
        d_hidden = torch.zeros_like(hidden, dtype=dtype) if needs_d_hidden else None
        for rows in row_chunks(labels.numel(), weight.shape[0], chunk_numel):
            chunk = hidden[rows], labels[rows], losses[rows], largest[rows], total[rows]
            _walk_rows(*chunk, weight, bias, None if d_hidden is None else d_hidden[rows], ctx.scale)
        ctx.save_for_backward(hidden, weight, bias, labels, largest, total, d_hidden)
        return losses.sum(dtype=torch.float64).to(dtype)  # one number a token: more digits cost nothing

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "linear_cross_entropy is differentiable once: with create_graph=True its gradients would pass for "
                "constants; use F.cross_entropy(F.linear(...)) there"
            )
        hidden, weight, bias, labels, largest, total, d_hidden = ctx.saved_tensors
        factor = gradient / ctx.scale
        if d_hidden is not None:  # the saved one stays as it is: backward may come again
            d_hidden = torch.mul(d_hidden, factor, out=torch.empty_like(hidden))
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        d_bias = torch.empty_like(bias) if ctx.needs_input_grad[2] else None
        if d_weight is not None or d_bias is not None:
            for block in vocabulary_blocks(weight.shape[0], max(hidden.shape), ctx.chunk_numel):
                of_block = [None if tensor is None else tensor[block] for tensor in (bias, d_weight, d_bias)]
                rows = hidden, labels - block.start, largest, total
                _walk_vocabulary(*rows, weight[block], *of_block, scale=ctx.scale, factor=factor)
        return d_hidden, d_weight, d_bias, None, None, None


def _walk_rows(
    hidden: Tensor,  # (rows, width)
    labels: Tensor,  # (rows,)
    losses: Tensor,  # (rows,), written, as the next two
    largest: Tensor,
    total: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    d_hidden: Tensor | None,  # (rows, width), zeros, written; None: not needed
    scale: float,
) -> None:
    """A chunk of rows, all logits: fill in what has a number a row, and `scale` times the gradient by `hidden`."""
    kernels, logits = _kernels_for(hidden), F.linear(hidden, weight, bias)
    kernels.sum_exponentials(logits, labels, losses, largest, total)
    if d_hidden is not None:
        _add_product(d_hidden, kernels.gradient_(logits, labels, largest, total, scale), weight)


def _walk_vocabulary(
    hidden: Tensor,  # (rows, width)
    labels: Tensor,  # (rows,)
    largest: Tensor,
    total: Tensor,
    weight: Tensor,  # (block, width)
    bias: Tensor | None,  # (block,)
    d_weight: Tensor | None,  # (block, width), written; None: not needed
    d_bias: Tensor | None,
    *,
    scale: float,
    factor: Tensor,
) -> None:
    """All rows, a block of the vocabulary: fill in its rows of the gradients. labels count from its start."""
    d_logits = _kernels_for(hidden).gradient_(F.linear(hidden, weight, bias), labels, largest, total, scale)
    if d_weight is not None:
        product = torch.zeros_like(d_weight, dtype=total.dtype)
        _add_product(product, d_logits.T, hidden)
        torch.mul(product, factor, out=d_weight)
    if d_bias is not None:
        torch.mul(d_logits.sum(0, dtype=total.dtype), factor, out=d_bias)


def _add_product(total: Tensor, one: Tensor, other: Tensor) -> None:
    """total += one @ other, summed in the dtype of `total`: fp32, where the factors may have fewer bits."""
    if other.dtype == total.dtype:
        total.addmm_(one.to(total.dtype), other)
    elif total.device.type == "cuda":
        total.add_(torch.mm(one.to(other.dtype), other, out_dtype=total.dtype))
    else:  # no such product on the CPU: `other` is widened, no more of it at once than `one` is large
        step = max(one.numel() // other.shape[1], 1)
        for start in range(0, other.shape[0], step):
            part = slice(start, start + step)
            total.addmm_(one[:, part].to(total.dtype), other[part].to(total.dtype))


def _kernels_for(hidden: Tensor) -> ModuleType:
    """reference.py, or the Triton functions of the same names on a GPU; fp64 is for checks."""
    if hidden.device.type == "cuda" and hidden.dtype != torch.float64:
        return importlib.import_module("zerolite_kernels.loss.triton_kernels")
    return reference
