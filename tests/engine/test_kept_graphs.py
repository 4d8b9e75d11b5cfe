"""Does a model whose modules keep losses, and with them their graphs, leave nothing when nobody holds it any more?"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from models import Block, Stack, drawn
from torch import nn

import zerolite


class Router(Block):
    def forward(self, x):
        self.auxiliary = self.up(x).square().mean()
        return super().forward(x)


class Model(Stack):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Router(7) for _ in range(3))

    def forward(self, x):
        self.last_output = super().forward(x)
        return self.last_output


def left_behind(stage: int, offload, precision) -> list[str]:
    left = []
    for is_trained in (True, False):
        model = zerolite.shard(drawn(Model), stage=stage, offload=offload, precision=precision)
        optimizer = zerolite.AdamW(model.parameters(), lr=1e-3)
        loss = model(torch.ones(4, 5)).float().square().mean() + sum(block.auxiliary for block in model.blocks)
        if is_trained:
            loss.backward()
            optimizer.step()
        kept = {"engine": weakref.ref(model._zerolite), "model": weakref.ref(model)}
        del model, optimizer, loss
        gc.collect()
        left += [f"{name}, trained: {is_trained}" for name, reference in kept.items() if reference() is not None]
    return left


@pytest.mark.parametrize(
    "stage, offload, precision",
    [
        (0, None, None),
        (2, "cpu", zerolite.Precision(torch.float16)),
        (3, zerolite.Offload(parameters=True), None),
    ],
)
def test_losses_kept_on_modules_keep_no_engine(ranks, stage, offload, precision):
    assert ranks(1).run(left_behind, stage, offload, precision) == [[]]


def outlive(stage: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of an input, by a backward that comes when the model has gone, and with the model there."""
    gradients = []
    for is_dropped in (True, False):
        model = zerolite.shard(drawn(Stack).double(), stage=stage)
        x = torch.ones(4, 5, dtype=torch.float64, requires_grad=True)
        loss = model(x).square().sum()
        if is_dropped:
            del model
            gc.collect()
        loss.backward()
        gradients.append(x.grad)
    return tuple(gradients)


def test_a_graph_that_outlives_its_model_is_plain_torchs(ranks):
    for stage in (0, 3):
        ((alone, usual),) = ranks(1).run(outlive, stage)
        assert torch.equal(alone, usual)
