"""A linear layer with LoRA: the same module with the same weight, another forward, and a child for each adapter.

[Note: a layer changes its class]
Base checkpoints, `load_pretrained` and `export` address `...q_proj.weight`, so an adapted layer must not move into a
wrapper. Its class is swapped for a subclass of its own, and it gets a child `lora`, a ModuleDict by the adapter's name.

[Note: one input, several projections]
Q, K and V read one input. When one of them is called inside a forward of their parent module, the kernels compute all
three. The other two outputs are kept, and each is returned when its layer is called with the very same tensor. A layer
that is called in any other way (another input, a second call, a hook that replaces the input) computes its own output.
The parent's forward ends with the kept outputs dropped.
"""

import functools
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D
from zerolite_kernels.lora import MAX_RANK, lora_linears

from zerolite.adapters.state import Adapters
from zerolite.engine.engine import info_of

ROWS_NUMEL = 4 * 1024 * 1024  # elements of a weight that are widened to fp32 at once


class LowRank(nn.Module):
    """The low-rank matrices of one adapter on one layer W (N, K)."""

    lora_A: nn.Parameter  # (r, K)
    lora_B: nn.Parameter  # (N, r)
    magnitude: nn.Parameter | None  # (N,), DoRA
    together: "Together | None"  # with the layers that read the same input

    def __init__(self, layer: nn.Module, r: int, scale: float, dropout: float, use_dora: bool):
        """On a W without values (meta device) DoRA's magnitude is NaN, and `is_magnitude_missing` says so."""
        super().__init__()
        self.scale, self.dropout, self.together = scale, dropout, None
        weight = matrix(layer)
        (rows, columns), device = weight.shape, torch.device("cpu") if weight.is_meta else weight.device
        A = nn.init.kaiming_uniform_(torch.empty(r, columns, dtype=_wide(weight.dtype), device=device), a=math.sqrt(5))
        self.lora_A = nn.Parameter(A.to(weight.dtype))
        self.lora_B = nn.Parameter(torch.zeros(rows, r, dtype=weight.dtype, device=device))
        self.is_magnitude_missing = use_dora and weight.is_meta
        self.magnitude = None
        if use_dora:
            norms = torch.full((rows,), float("nan")) if weight.is_meta else self.row_norms(layer)
            self.magnitude = nn.Parameter(norms.to(weight.dtype))

    def extra_repr(self) -> str:
        dora = ", DoRA" if self.magnitude is not None else ""
        return f"r={self.lora_A.shape[0]}, scale={self.scale:g}, dropout={self.dropout:g}{dora}"

    def term(self, x: torch.Tensor) -> torch.Tensor:
        """scale B A x for x (..., K): (..., N), in the adapter's dtype."""
        return F.linear(F.linear(x.to(self.lora_A.dtype), self.lora_A), self.lora_B) * self.scale

    @torch.no_grad()
    def row_norms(self, layer: nn.Module) -> torch.Tensor:
        """(N,) norms of the rows of W + scale B A, in fp32 or wider, without that matrix.

        ||w + s A^T b||^2 = ||w||^2 + 2 s b.(A w) + s^2 b.(A A^T b) for a row w of W and the same row b of B.
        """
        squares = []
        with torch.autocast(layer.weight.device.type, enabled=False):
            A = self.lora_A.to(_wide(layer.weight.dtype))
            gram = A @ A.T
            for w, b in self.row_blocks(layer):
                w, b = w.to(A.dtype), b.to(A.dtype)
                cross, square = ((w @ A.T) * b).sum(1), ((b @ gram) * b).sum(1)
                norms = torch.linalg.vector_norm(w, dim=1)
                squares.append(norms.square() + 2 * self.scale * cross + self.scale**2 * square)
        return torch.cat(squares).sqrt()

    def gain(self, layer: nn.Module) -> torch.Tensor:
        """DoRA's factors (N,), magnitude / ||W + scale B A||, in fp32 or wider; the norm is a constant to backward.

        The norm is rounded as the magnitude is: in 16 bits, too, the factors begin as ones (and PEFT's are these).
        """
        assert self.magnitude is not None, "only DoRA has a gain"
        norms = self.row_norms(layer).to(self.magnitude.dtype)
        return self.magnitude.to(_wide(norms.dtype)) / norms

    @torch.no_grad()
    def merge_into(self, layer: nn.Module) -> None:
        """W becomes W + scale B A, with DoRA scaled to the magnitude, added in fp32 or wider and rounded once."""
        dtype = _wide(layer.weight.dtype)
        A = self.lora_A.to(dtype)
        gain = None if self.magnitude is None else self.gain(layer)
        start = 0
        for w, b in self.row_blocks(layer):
            merged = torch.addmm(w.to(dtype), b.to(dtype), A, alpha=self.scale)
            if gain is not None:
                merged *= gain[start : start + len(w), None]
            w.copy_(merged)
            start += len(w)

    def row_blocks(self, layer: nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Blocks of rows of W and the same rows of B: widened to fp32, a block is at most ROWS_NUMEL elements of W."""
        weight = matrix(layer)
        num_rows = max(1, ROWS_NUMEL // weight.shape[1])
        return zip(weight.split(num_rows), self.lora_B.split(num_rows), strict=True)


class LoraLayer(nn.Module):
    """Mixed into the class of an adapted layer; see [Note: a layer changes its class]."""

    lora: nn.ModuleDict  # adapter name -> LowRank
    adapters: Adapters  # the model's; it says which one forwards use
    weight: nn.Parameter  # (N, K), or (K, N) of a Conv1D
    bias: nn.Parameter | None  # (N,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        adapter = self.adapters.current
        if adapter is None or adapter.name not in self.lora:
            return super().forward(x)
        low_rank = self.lora[adapter.name]
        if low_rank.magnitude is not None:
            return self._directed(x, low_rank)
        # A compiler writes kernels of its own for plain torch, and would stop at ours.
        if torch.compiler.is_compiling() or not _serves_kernel(self, low_rank):
            result = super().forward(x)
            return (result + low_rank.term(_dropped(self, low_rank, x))).to(result.dtype)
        if low_rank.together is not None:
            return low_rank.together.output(self, x)
        return project(x, [self], adapter.name)[0]

    def _directed(self, x: torch.Tensor, low_rank: LowRank) -> torch.Tensor:
        """DoRA: W x + bias + (g - 1) W x' + g scale B A x' with x' = dropout(x) and the gain g.

        Liu et al. 2024, arXiv 2402.09353; what is dropped where is PEFT's. With g = 1 and B = 0 it is the base's bits.
        """
        result, dropped = super().forward(x), _dropped(self, low_rank, x)
        if dropped is not x:
            product = F.linear(dropped, matrix(self))
        else:
            product = result if self.bias is None else result - self.bias
        gain = low_rank.gain(self)
        turned = (gain - 1).to(result.dtype) * product + gain.to(result.dtype) * low_rank.term(dropped)
        return result + turned.to(result.dtype)


@functools.cache
def adapted_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a linear layer's class that an adapted layer is of; one for each class."""
    return type(f"Lora{cls.__name__}", (LoraLayer, cls), {"__module__": __name__})


def matrix(layer: nn.Module) -> torch.Tensor:
    """W (N, K) of a linear layer: its weight, or a view of it where it is kept as (K, N)."""
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


def project(x: torch.Tensor, layers: Sequence[nn.Module], name: str) -> tuple[torch.Tensor, ...]:
    """Outputs (..., N) of layers that read x (..., K), each with its adapter called `name`; one call of the kernels."""
    low_ranks = [layer.lora[name] for layer in layers]
    return lora_linears(
        x,
        tuple(matrix(layer) for layer in layers),
        tuple(layer.bias for layer in layers),
        tuple(low_rank.lora_A for low_rank in low_ranks),
        tuple(low_rank.lora_B for low_rank in low_ranks),
        low_ranks[0].scale,
        low_ranks[0].dropout if layers[0].training else 0.0,
    )


def has_plain_forward(layer: nn.Module) -> bool:
    """Whether the layer's own forward is that of nn.Linear or Conv1D: x W^T + bias, and nothing else."""
    base = next(cls for cls in type(layer).__mro__ if "forward" in vars(cls) and cls is not LoraLayer)
    return base in (nn.Linear, Conv1D)


def _serves_kernel(layer: nn.Module, low_rank: LowRank) -> bool:
    """Whether the kernels can compute this layer: a frozen base, a rank up to MAX_RANK, no forward of its own."""
    trains_base = layer.weight.requires_grad or (layer.bias is not None and layer.bias.requires_grad)
    return not trains_base and low_rank.lora_A.shape[0] <= MAX_RANK and has_plain_forward(layer)


def _dropped(layer: nn.Module, low_rank: LowRank, x: torch.Tensor) -> torch.Tensor:
    return F.dropout(x, low_rank.dropout) if layer.training and low_rank.dropout > 0 else x


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class Together:
    """Layers of one parent that usually read one input. See [Note: one input, several projections].

    The parent's hooks own it. It holds outputs only inside a forward of the parent.
    """

    def __init__(self, parent: nn.Module, layers: Sequence[nn.Module], name: str):
        """`layers` have adapters called `name` with equal r, scale and dropout, and inputs of one width."""
        self.layers, self.name = list(layers), name
        self.is_open = False  # inside a forward of the parent
        self.outputs: dict[nn.Module, torch.Tensor] = {}  # computed, not returned yet
        self.key: tuple = ()
        for layer in layers:
            layer.lora[name].together = self
        parent.register_forward_pre_hook(self._open, prepend=True)
        parent.register_forward_hook(self._close, always_call=True)

    def _open(self, parent: nn.Module, args: tuple) -> None:
        self.is_open = True

    def _close(self, parent: nn.Module, args: tuple, output: object) -> None:
        self.is_open = False
        self.outputs.clear()
        self.key = ()

    def output(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """The output of `layer` for x: a kept one, or computed now, with the other layers where they may share."""
        key = _key(layer, x)
        if layer in self.outputs and self._is_key(key):
            return self.outputs.pop(layer)
        if self.outputs or not self._can_share(layer, x):
            return project(x, [layer], self.name)[0]
        self.key = key
        self.outputs = dict(zip(self.layers, project(x, self.layers, self.name), strict=True))
        return self.outputs.pop(layer)

    def _is_key(self, key: tuple) -> bool:
        return key[0] is self.key[0] and key[1:] == self.key[1:]

    def _can_share(self, layer: nn.Module, x: torch.Tensor) -> bool:
        return (
            self.is_open
            and not x.is_inference()  # it has no version counter, so a write in between would go unseen
            and all(
                _unit_of(other) is _unit_of(layer) and _serves_kernel(other, other.lora[self.name])
                for other in self.layers
            )
        )


def _key(layer: nn.Module, x: torch.Tensor) -> tuple:
    """What must be equal for a kept output to be valid: the input, its version, grad mode, training mode."""
    version = 0 if x.is_inference() else x._version
    return x, version, torch.is_grad_enabled(), layer.training


def _unit_of(layer: nn.Module):
    """The unit that gathers the layer's weight; None where the model is not sharded."""
    info = info_of(layer.weight)
    return None if info is None else info.bucket.unit
