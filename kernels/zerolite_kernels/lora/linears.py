"""Linear layers with LoRA that share an input, Q, K and V or a single one, as one step of autograd that saves little.

    y_i = x W_i^T + b_i + scale * dropout_i(x) A_i^T B_i^T

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021; each projection has a mask of its own, as PEFT has
it. The weights are frozen. Saved for backward: x once, the low-rank products S_i, one bit per element for each mask,
and the weights themselves, never copies: under ZeRO-3 their storage is freed after forward and filled again before
backward. The formulas are in reference.py.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zerolite_kernels.lora import reference

MAX_RANK = 256
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Who computes an operation where triton runs: (without dropout, with dropout). Products with W stay with cuBLAS, and so
# does what is a plain product, "torch". The choice is by measurement: benchmarks/adapters/lora.py has both sides. No
# GPU has measured it yet; until then it follows from the bytes that each side moves.
CHOICES = {
    "lora_xa": ("torch", "triton"),
    "lora_db_ds": ("triton", "triton"),
    "lora_da": ("torch", "triton"),
    "lora_dx_": ("torch", "triton"),
}


def lora_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scale: float,
    dropout: float,
    *,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """One output (..., N_i) for each of the weights.

    x: (..., K), any float dtype, strided as it may be. weights: frozen (N_i, K), transposed views as well; biases:
    frozen (N_i,) or None. As: (r, K), Bs: (N_i, r), 1 <= r <= 256, used in x's dtype; gradients come in their own.
    dropout: in [0, 1), already 0 outside of training; rounded to a multiple of 2^-16, drawn from one number of torch's
    default CPU generator, so that `manual_seed` and activation checkpointing repeat it, and no device is waited for.
    backend: "triton" or "torch" for tests and benchmarks; None: triton for CUDA tensors of up to 32 bits where it is
    installed, else torch. The gradient of an output that is not used is zero. Backward runs once: no double backward.

    Raises ValueError for weights or biases that require a gradient, ranks that differ, shapes or dtypes that do not
    fit.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weights = x.to(dtype), [weight.to(dtype) for weight in weights]
        biases = [bias if bias is None else bias.to(dtype) for bias in biases]
    check(x, weights, biases, As, Bs, dropout)
    if backend is None:
        is_for_triton = x.device.type == "cuda" and x.dtype in TRITON_DTYPES and has_triton()
        backend = "triton" if is_for_triton else "torch"
    seed = _seed() if dropout > 0 else 0
    with torch.autocast(x.device.type, enabled=False):
        return LoraLinears.apply(backend, scale, dropout, seed, biases, x, *weights, *As, *Bs)


def check(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    dropout: float,
) -> None:
    """ValueError for what `lora_linears` refuses."""
    if not len(weights) == len(biases) == len(As) == len(Bs) >= 1:
        counts = f"{len(weights)} weights, {len(biases)} biases, {len(As)} As, {len(Bs)} Bs"
        raise ValueError(f"each projection has a weight, a bias or None, an A and a B; got {counts}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is at least 0 and less than 1, got {dropout}")
    r, K = As[0].shape[0], x.shape[-1]
    if not 1 <= r <= MAX_RANK:
        raise ValueError(f"the rank is 1 to {MAX_RANK}, got {r}")
    for i, (weight, bias, A, B) in enumerate(zip(weights, biases, As, Bs, strict=True)):
        N = weight.shape[0]
        shapes = {"weight": (weight, (N, K)), "bias": (bias, (N,)), "A": (A, (r, K)), "B": (B, (N, r))}
        for name, (tensor, shape) in shapes.items():
            if tensor is not None and tensor.shape != shape:
                raise ValueError(
                    f"{name} {i} should be {shape} for an input of {tuple(x.shape)} and the rank {r} of A 0, "
                    f"got {tuple(tensor.shape)}"
                )
        for name, tensor in [("weight", weight), ("bias", bias)]:
            if tensor is not None and tensor.requires_grad:
                raise ValueError(f"{name} {i} requires a gradient, which LoRA does not compute: freeze the base model")
            if tensor is not None and tensor.dtype != x.dtype:
                raise ValueError(f"{name} {i} is {tensor.dtype}, but x is {x.dtype}: cast one of them")


@functools.cache
def has_triton() -> bool:
    """Whether triton is installed; it is not imported."""
    return importlib.util.find_spec("triton") is not None


def kernels(name: str, x: Tensor, dropout: float, backend: str) -> ModuleType:
    """The module whose function of that name computes the operation."""
    if backend == "torch" or CHOICES[name][dropout > 0] == "torch" or x.numel() == 0:
        return reference
    return importlib.import_module("zerolite_kernels.lora.triton_launch")


def _seed() -> int:
    """Of one forward's dropout, from the default CPU generator; 0 among fake tensors, which have no values."""
    drawn = torch.randint(1 << 62, (1 << 63) - 1, ())
    return int(drawn) if type(drawn) is Tensor else 0


class LoraLinears(torch.autograd.Function):
    """`lora_linears` for autograd: gradients of x, the As and the Bs. Weights and biases are frozen and have none."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        scale: float,
        dropout: float,
        seed: int,
        biases: Sequence[Tensor | None],
        x: Tensor,
        *tensors: Tensor,  # the weights, the As, the Bs
    ) -> tuple[Tensor, ...]:
        n = len(biases)
        weights, As, Bs = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        rows = x.reshape(-1, x.shape[-1])
        S, bits = kernels("lora_xa", rows, dropout, backend).lora_xa(rows, stack(As, x), dropout, seed)
        outputs = tuple(x.new_empty(*x.shape[:-1], len(weight)) for weight in weights)
        for y, weight, bias, B, S_i in zip(outputs, weights, biases, Bs, S, strict=True):
            y = y.view(-1, len(weight))  # the output itself is no view: it may be written in place
            if bias is None:
                torch.mm(rows, weight.t(), out=y)
            else:
                torch.addmm(bias, rows, weight.t(), out=y)
            y.addmm_(S_i, B.to(x.dtype).t(), alpha=scale)
        ctx.save_for_backward(x, S, bits, *weights, *As, *Bs)
        ctx.backend, ctx.scale, ctx.dropout = backend, scale, dropout
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        n, dropout = len(dys), ctx.dropout
        x, S, bits, *tensors = ctx.saved_tensors
        weights, As, Bs = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        needs_dx, needs_dA = ctx.needs_input_grad[5], any(ctx.needs_input_grad[6 + n : 6 + 2 * n])
        rows = x.reshape(-1, x.shape[-1])
        flat_dys = [dy.reshape(-1, dy.shape[-1]) for dy in dys]

        def kernel(name: str) -> Callable:
            return getattr(kernels(name, rows, dropout, ctx.backend), name)

        with torch.autocast(x.device.type, enabled=False):
            dS = torch.empty_like(S)
            dBs = [
                kernel("lora_db_ds")(dy, S_i, B.to(x.dtype), ctx.scale, dS_i, B.dtype)
                for dy, S_i, B, dS_i in zip(flat_dys, S, Bs, dS, strict=True)
            ]
            dx, dAs = None, [None] * n
            if needs_dA:
                dAs = kernel("lora_da")(dS, rows, bits, dropout, As[0].dtype)
                dAs = [dA.to(A.dtype) for dA, A in zip(dAs, As, strict=True)]
            if needs_dx:
                dx = torch.mm(flat_dys[0], weights[0])
                for dy, weight in zip(flat_dys[1:], weights[1:], strict=True):
                    reference.add_product_(dx, dy, weight)
                kernel("lora_dx_")(dx, dS, stack(As, x), bits, dropout)
                dx = dx.view(x.shape)
        return None, None, None, None, None, dx, *[None] * n, *dAs, *dBs


def stack(As: Sequence[Tensor], x: Tensor) -> Tensor:
    """(n, r, K) in x's dtype: small beside x, and made anew in backward."""
    return torch.stack([A.to(x.dtype) for A in As])
