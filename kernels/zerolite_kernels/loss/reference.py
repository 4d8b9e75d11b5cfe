"""What the Triton kernels of the loss compute, in plain torch: the truth for tests, and what runs on the CPU."""

import torch
from torch import Tensor


def sum_exponentials(logits: Tensor, labels: Tensor, losses: Tensor, largest: Tensor, total: Tensor) -> None:
    """Of logits (rows, vocabulary): each row's largest l, total = sum of exp(logit - l), and its loss. (rows,) each."""
    torch.amax(logits.to(largest.dtype), 1, out=largest)
    shifted = logits - largest[:, None]
    of_label = shifted.gather(1, labels[:, None])[:, 0]
    torch.sum(shifted.exp_(), 1, out=total)
    torch.sub(total.log(), of_label, out=losses)


def gradient_(logits: Tensor, labels: Tensor, largest: Tensor, total: Tensor, scale: float) -> Tensor:
    """`scale` times the gradient of the losses' sum by the logits, all of a row's or some, which are overwritten.

    logits (rows, columns); a label that is no column is elsewhere in the vocabulary. At least fp32 here, the logits'
    dtype from Triton.
    """
    gradient = logits.to(largest.dtype).sub_(largest[:, None]).exp_().div_((total / scale)[:, None])
    is_here = (labels >= 0) & (labels < logits.shape[1])
    columns = torch.where(is_here, labels, 0)[:, None]
    return gradient.scatter_add_(1, columns, (-scale * is_here.to(gradient.dtype))[:, None])
