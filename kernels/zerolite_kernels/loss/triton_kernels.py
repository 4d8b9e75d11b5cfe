"""Softmax sums of logits on a GPU, and the cross-entropy's gradient written over the logits in their own dtype.

Plain torch reads and writes them some ten times, mostly in fp32; these kernels read them twice and write them once.
"""

import triton
import triton.language as tl
from torch import Tensor

from zerolite_kernels.current_gpu import on_its_device

BLOCK = 4096  # logits that a program holds at once: 16 a thread
NUM_WARPS = 8


# Rows are slices of longer tensors, which begin anywhere: a variant for each alignment would be compiled, and is no
# faster, as a program reads one number of each.
ROWS = ["labels_ptr", "losses_ptr", "largest_ptr", "total_ptr"]


@triton.jit(do_not_specialize_on_alignment=ROWS)
def sum_exponentials_kernel(
    logits_ptr, labels_ptr, losses_ptr, largest_ptr, total_ptr, vocabulary, BLOCK: tl.constexpr
):
    """A row a program. Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", algorithm 3."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * vocabulary
    label = tl.load(labels_ptr + row)
    is_inside = (label >= 0) & (label < vocabulary)
    of_label = tl.load(logits_ptr + label, mask=is_inside, other=float("nan")).to(tl.float32)
    lanes = tl.arange(0, BLOCK)
    largest = -float("inf")
    total = 0.0
    for start in range(0, vocabulary, BLOCK):
        x = tl.load(logits_ptr + start + lanes, mask=start + lanes < vocabulary, other=-float("inf")).to(tl.float32)
        before, largest = largest, tl.maximum(largest, tl.max(x, 0))
        shift = tl.where(largest == -float("inf"), 0.0, largest)  # nothing finite so far: exp(-inf), not exp(nan)
        total = total * tl.exp(before - shift) + tl.sum(tl.exp(x - shift), 0)
    tl.store(losses_ptr + row, tl.log(total) - (of_label - largest))
    tl.store(largest_ptr + row, largest)
    tl.store(total_ptr + row, total)


@triton.jit(do_not_specialize_on_alignment=ROWS)
def gradient_kernel(logits_ptr, labels_ptr, largest_ptr, total_ptr, num_columns, scale, BLOCK: tl.constexpr):
    """scale * (exp(logit - largest) / total - [column is the label]), a block of a row a program."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < num_columns
    logits_ptr += row * num_columns + columns
    label, largest, total = tl.load(labels_ptr + row), tl.load(largest_ptr + row), tl.load(total_ptr + row)
    x = tl.load(logits_ptr, mask=mask, other=0.0).to(tl.float32)
    gradient = tl.div_rn(tl.exp(x - largest), total) * scale - tl.where(columns == label, scale, 0.0)
    tl.store(logits_ptr, gradient.to(logits_ptr.dtype.element_ty), mask=mask)


@on_its_device
def sum_exponentials(logits: Tensor, labels: Tensor, losses: Tensor, largest: Tensor, total: Tensor) -> None:
    """`reference.sum_exponentials`; a label outside the vocabulary gives a loss of nan."""
    rows, vocabulary = logits.shape
    block = min(BLOCK, triton.next_power_of_2(vocabulary))
    sum_exponentials_kernel[(rows,)](
        logits, labels, losses, largest, total, vocabulary, BLOCK=block, num_warps=NUM_WARPS
    )


@on_its_device
def gradient_(logits: Tensor, labels: Tensor, largest: Tensor, total: Tensor, scale: float) -> Tensor:
    """`reference.gradient_`, in place."""
    rows, num_columns = logits.shape
    block = min(BLOCK, triton.next_power_of_2(num_columns))
    gradient_kernel[(rows, triton.cdiv(num_columns, block))](
        logits, labels, largest, total, num_columns, scale, BLOCK=block, num_warps=NUM_WARPS
    )
    return logits
