"""Under fp16's loss scale, is what loops do to gradients by hand what they do to torch's unscaled gradients?

The reference keeps fp32 masters beside a model in fp16, unscales by hand and steps by torch.optim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hand_loops import OPTIONS, build
from models import assert_close
from torch import nn
from torch.nn.utils import clip_grad_norm_

import zerolite

SCALE, STEPS = 2.0**10, 4


def rows(step: int) -> torch.Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(step))


class Masters:
    """What torch's users write by hand; `parameters` have unscaled gradients in fp32."""

    def __init__(self):
        self.model = build(torch.float32).half()
        self.masters = [nn.Parameter(parameter.detach().float()) for parameter in self.model.parameters()]
        self.optimizer = torch.optim.AdamW(self.masters, **OPTIONS)
        self.scale = SCALE

    def parameters(self) -> list[nn.Parameter]:
        return self.masters

    def backward(self, step: int, factor: float) -> None:
        loss = self.model(rows(step).half()).float().square().mean() * factor
        (loss * self.scale).backward()
        for parameter, master in zip(self.model.parameters(), self.masters, strict=True):
            own = parameter.grad.float() / self.scale
            master.grad = own if master.grad is None else master.grad + own
            parameter.grad = None

    def step(self) -> bool:
        is_finite = all(master.grad.isfinite().all() for master in self.masters if master.grad is not None)
        if is_finite:
            self.optimizer.step()
        else:
            self.scale /= 2
        with torch.no_grad():
            for parameter, master in zip(self.model.parameters(), self.masters, strict=True):
                parameter.copy_(master)
        self.optimizer.zero_grad()
        return not is_finite

    def values(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}


class Sharded:
    def __init__(self, stage: int, offload: zerolite.Offload | None):
        scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
        precision = zerolite.Precision(torch.float16, torch.float32, scaler)
        self.model = zerolite.shard(build(torch.float32).half(), stage=stage, precision=precision, offload=offload)
        self.optimizer = zerolite.AdamW(self.model.parameters(), **OPTIONS)

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.model.parameters()

    def backward(self, step: int, factor: float) -> None:
        (self.model(rows(step)).square().mean() * factor).backward()

    def step(self) -> bool:
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.optimizer.step_was_skipped

    def values(self) -> dict[str, torch.Tensor]:
        with zerolite.full_params(self.model):
            return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}


Side = Masters | Sharded


def scaled(side: Side) -> list[float]:
    """Between two backwards and after them, each parameter in its own way."""
    for step in range(STEPS):
        side.backward(2 * step, 1.0)
        for index, parameter in enumerate(side.parameters()):
            parameter.grad.mul_(0.5 + 0.25 * (index % 3))
        side.backward(2 * step + 1, 1.0)
        for parameter in side.parameters():
            parameter.grad.div_(3.0)
        side.step()
    return []


def clipped(side: Side) -> list[float]:
    """In a part, then in all; norms are of unscaled gradients. The second step overflows."""
    logged = []
    for step in range(STEPS):
        side.backward(step, 1.0 if step != 1 else math.inf)
        norms = [clip_grad_norm_(list(side.parameters())[:2], 0.05), clip_grad_norm_(side.parameters(), 0.1)]
        logged += [norm.item() for norm in norms if step != 1]
        logged.append(float(side.step()))
    return logged


def looked_at_and_zeroed(side: Side) -> list[float]:
    logged = []
    for step in range(STEPS):
        side.backward(step, 1.0)
        logged += [parameter.grad.norm().item() for parameter in side.parameters()]
        first, second, *_ = side.parameters()
        first.grad.zero_()
        second.grad = None
        side.step()
    return logged


LOOPS: list[Callable[[Side], list[float]]] = [scaled, clipped, looked_at_and_zeroed]


def by_hand(stage: int, offload: zerolite.Offload | None):
    results = []
    for loop in LOOPS:
        side = Sharded(stage, offload)
        results.append((loop(side), side.values()))
    return results


@pytest.mark.parametrize("stage, offload", [(1, None), (3, None), (2, zerolite.Offload(workers=1, threads=1))], ids=str)
def test_gradients_by_hand_are_those_of_masters(ranks, stage, offload):
    for results in ranks(2).run(by_hand, stage, offload):
        for loop, (logged, values) in zip(LOOPS, results, strict=True):
            side = Masters()
            expected = loop(side)
            assert logged == pytest.approx(expected, rel=1e-5), loop.__name__
            assert_close(values, side.values(), rtol=2e-3, atol=1e-4)
