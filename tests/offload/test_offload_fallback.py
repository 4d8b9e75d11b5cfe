"""Without the built kernels torch's fused AdamW steps in the workers: one warning, and the same numbers to 1e-6."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from zerolite_kernels import cpu
from zerolite_kernels.cpu import fallback
from zerolite_kernels.cpu.command import Command

import zerolite
from zerolite.runtime import cpu_kernels

SHAPES = [(1,), (15,), (16, 17), (1025,), (300, 40)]


@pytest.fixture
def no_kernels(monkeypatch):
    monkeypatch.setattr(cpu, "path", lambda: None)
    monkeypatch.setattr(cpu, "load", lambda: None)
    cpu_kernels._library.cache_clear()
    yield
    cpu_kernels._library.cache_clear()


class Bag(torch.nn.Module):
    """Parameters whose gradients are given."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        torch.manual_seed(0)
        self.parts = torch.nn.ParameterList(torch.randn(shape, dtype=dtype) for shape in SHAPES)

    def forward(self, gradients):
        return sum((part * gradient).sum() for part, gradient in zip(self.parts, gradients, strict=True))


@pytest.mark.parametrize("name", ["AdamW", "Adam", "Lion", "Lamb"])
def test_ten_steps_agree_with_torch(no_kernels, name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = zerolite.shard(Bag(torch.float32), stage=0, offload="cpu")
        plain = zerolite.shard(Bag(torch.float32), stage=0)
    assert len([one for one in caught if "kernels were not built" in str(one.message)]) == 1
    optimizers = [getattr(zerolite, name)(each.parameters(), lr=1e-2, weight_decay=0.1) for each in (model, plain)]
    exact = Bag(torch.float32)
    if name in ("AdamW", "Adam"):
        reference = getattr(torch.optim, name)(exact.parameters(), lr=1e-2, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        gradients = [torch.randn(shape, generator=generator) for shape in SHAPES]
        for each, optimizer in zip((model, plain), optimizers, strict=True):
            each(gradients).backward()
            optimizer.step()
            optimizer.zero_grad()
        if name in ("AdamW", "Adam"):
            exact(gradients).backward()
            reference.step()
            reference.zero_grad()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
    if name in ("AdamW", "Adam"):
        for mine, theirs in zip(model.parameters(), exact.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


def test_other_states_are_refused_by_name(no_kernels):
    for offload in (zerolite.Offload(states="int8"), zerolite.Offload(path="/")):
        with pytest.raises(ValueError, match="need the kernels that are built at install time"):
            zerolite.shard(Bag(torch.float32), stage=0, offload=offload)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95), (0.0, 0.99), (0.9, 0.0), (0.99, 0.9999)])
@pytest.mark.parametrize("step", [1, 2, 3, 10, 99, 1000, 12345])
def test_the_step_follows_from_the_bias_corrections(betas, step):
    """Or one whose corrections are the same in fp32."""
    corrections = [1 - beta**step for beta in betas]
    command = Command(
        beta1=betas[0],
        beta2=betas[1],
        bias_correction1=corrections[0],
        bias_correction2_sqrt=math.sqrt(corrections[1]),
    )
    found = fallback.step_of(command)
    assert [1 - beta**found for beta in betas] == pytest.approx(corrections, rel=1e-8)
