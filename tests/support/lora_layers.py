"""Projections with LoRA as tensors, and what kernels are compared with: PEFT's layers, the formula in plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from zerolite_kernels.lora import lora_linears, reference

SCALE = 2.0


@dataclass
class Layer:
    """n projections of K to N features, their input and the gradients of their outputs."""

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    As: list[Tensor]
    Bs: list[Tensor]
    dys: list[Tensor]

    @property
    def leaves(self) -> dict[str, Tensor]:
        named = {"x": self.x}
        for i, (A, B) in enumerate(zip(self.As, self.Bs, strict=True)):
            named |= {f"A{i}": A, f"B{i}": B}
        return named

    def to(self, *target) -> Layer:
        """In another dtype or on another device, with leaves of its own."""

        def to(tensors, is_leaf=False):
            return [None if t is None else t.detach().to(*target).requires_grad_(is_leaf) for t in tensors]

        (x,) = to([self.x], True)
        return Layer(x, to(self.weights), to(self.biases), to(self.As, True), to(self.Bs, True), to(self.dys))

    def ours(self, dropout: float, **options) -> tuple[Tensor, ...]:
        return lora_linears(self.x, self.weights, self.biases, self.As, self.Bs, SCALE, dropout, **options)

    def plain(self, dropout: float, keeps: list[Tensor | None]) -> list[Tensor]:
        """The formula, operation by operation."""
        outputs = []
        for weight, bias, A, B, keep in zip(self.weights, self.biases, self.As, self.Bs, keeps, strict=True):
            dropped = self.x if keep is None else Replayed(keep, dropout)(self.x)
            low_rank = nn.functional.linear(nn.functional.linear(dropped, A), B)
            outputs.append(nn.functional.linear(self.x, weight, bias) + low_rank * SCALE)
        return outputs

    def plain_base(self) -> list[Tensor]:
        """The frozen layers alone."""
        pairs = zip(self.weights, self.biases, strict=True)
        return [nn.functional.linear(self.x, weight, bias) for weight, bias in pairs]

    def results(self, outputs) -> dict[str, Tensor]:
        """Outputs and gradients by name, of a backward that starts from dys."""
        grads = torch.autograd.grad(list(outputs), list(self.leaves.values()), self.dys)
        named = {f"y{i}": y.detach() for i, y in enumerate(outputs)}
        return named | {f"d{name}": grad for name, grad in zip(self.leaves, grads, strict=True)}


def layer(shape, N: int, r: int, n=3, dtype=torch.float32, bias=True, seed=0, device="cpu") -> Layer:
    """A layer drawn in fp32 on the CPU; shape: of the input, K last."""
    generator = torch.Generator().manual_seed(seed)
    K = shape[-1]

    def draw(*size: int, std: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=generator) * std

    return Layer(
        draw(*shape),
        [draw(N, K, std=K**-0.5) for _ in range(n)],
        [draw(N) if bias else None for _ in range(n)],
        [draw(r, K, std=K**-0.5) for _ in range(n)],
        [draw(N, r, std=r**-0.5) for _ in range(n)],
        [draw(*shape[:-1], N) for _ in range(n)],
    ).to(device, dtype)


def masks(outputs: tuple[Tensor, ...]) -> list[Tensor | None]:
    """Each projection's mask (M, K), from the bits that our autograd function has saved."""
    x, _, bits, *_ = outputs[0].grad_fn.saved_tensors
    if bits is None:
        return [None] * len(outputs)
    return [reference.unpack_bits(plane, x.shape[-1]) for plane in bits]


class Replayed(nn.Module):
    """A dropout whose mask is given."""

    def __init__(self, keep: Tensor, dropout: float) -> None:
        super().__init__()
        self.keep, self.dropout = keep, dropout

    def forward(self, x: Tensor) -> Tensor:
        return x * self.keep.view(x.shape).to(x.dtype) * (1 / (1 - self.dropout))


def peft_layers(given: Layer, dropout: float, keeps: list[Tensor | None] | None = None) -> list[nn.Module]:
    """PEFT's own LoRA layers around the same tensors, their masks replayed where they are given."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    r, modules = given.As[0].shape[0], []
    for i, (weight, bias, A, B) in enumerate(zip(given.weights, given.biases, given.As, given.Bs, strict=True)):
        base = nn.Linear(*reversed(weight.shape), bias=bias is not None, dtype=weight.dtype).requires_grad_(False)
        base.weight.data = weight
        if bias is not None:
            base.bias.data = bias
        config = LoraConfig(r=r, lora_alpha=SCALE * r, lora_dropout=dropout)
        module = Linear(base, "default", config=config, r=r, lora_alpha=SCALE * r).train()
        module.lora_A["default"].weight, module.lora_B["default"].weight = nn.Parameter(A), nn.Parameter(B)
        if keeps is not None and keeps[i] is not None:
            module.lora_dropout["default"] = Replayed(keeps[i], dropout)
        modules.append(module)
    return modules


def peft_results(given: Layer, modules: list[nn.Module]) -> dict[str, Tensor]:
    outputs = [module(given.x) for module in modules]
    adapters = [getattr(m, name)["default"].weight for m in modules for name in ("lora_A", "lora_B")]
    grads = torch.autograd.grad(outputs, [given.x, *adapters], given.dys)
    named = {f"y{i}": y.detach() for i, y in enumerate(outputs)}
    return named | {f"d{name}": grad for name, grad in zip(given.leaves, grads, strict=True)}


def error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference beside the norm of what is expected."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-300)).item()


def error_ratios(shape, N: int, r: int, dropout: float, backend: str | None = None, num_draws=4, **options) -> dict:
    """Per output and gradient: our error against fp64 beside plain torch's, in the same precision and with our masks.

    Errors are root mean squares over a few draws, as the smallest tensors have less than a hundred elements.
    """
    squares: dict[str, tuple[float, float]] = {}
    for seed in range(num_draws):
        torch.manual_seed(seed)
        given = layer(shape, N, r, seed=seed, **options)
        outputs = given.ours(dropout, backend=backend)
        keeps = masks(outputs)
        ours, plain = given.results(outputs), given.results(given.plain(dropout, keeps))
        wide = given.to(torch.float64)
        for name, exact in wide.results(wide.plain(dropout, keeps)).items():
            sums = squares.get(name, (0.0, 0.0))
            squares[name] = sums[0] + error(ours[name], exact) ** 2, sums[1] + error(plain[name], exact) ** 2
    return {name: (ours / max(plain, 1e-300)) ** 0.5 for name, (ours, plain) in squares.items()}
