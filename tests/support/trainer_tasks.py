"""A small task for other people's trainers: a float64 model, uneven labels, torch's optimizer and scheduler.

Losses are means over a rank's own labels, as users write them; which of them are left out differs from rank to rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from models import Stack, drawn
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from zerolite.engine.engine import find_engine

BATCH, BATCHES, IGNORED = 2, 6, -100  # of one rank
CLIP = 2.2  # below some norms of these gradients, above others


def build(dtype: torch.dtype = torch.float64) -> nn.Module:
    return drawn(lambda: Stack(blocks=2)).to(dtype)


def rows(world: int, dtype: torch.dtype = torch.float64, seed: int = 5) -> TensorDataset:
    """Inputs (n, 5) and labels (n,) of 3 classes, some of them left out; no batch of a rank is without a label."""
    generator = torch.Generator().manual_seed(seed)
    total = BATCH * BATCHES * world
    labels = torch.randint(0, 3, (total,), generator=generator)
    labels[torch.rand(total, generator=generator) < 0.4] = IGNORED
    labels[labels.view(-1, BATCH).eq(IGNORED).all(1).repeat_interleave(BATCH)] = 1
    return TensorDataset(torch.randn(total, 5, generator=generator).to(dtype), labels)


def loader(world: int, dtype: torch.dtype = torch.float64, seed: int = 5) -> DataLoader:
    return DataLoader(rows(world, dtype, seed), batch_size=BATCH)


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / labels.ne(IGNORED).sum().clamp(1)


def optimizer_of(model: nn.Module) -> torch.optim.AdamW:
    """As most scripts have it: no decay for biases and norms. Gradients count through a large eps alone."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.05, eps=0.1)


def scheduler_of(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))


def is_syncing(model: nn.Module) -> bool | None:
    """Whether a backward reduces gradients; None for a model that is not sharded."""
    engine = find_engine(model)
    return None if engine is None else engine.is_syncing


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(((one[name].double() - other[name].double()).abs().max().item() for name in other), default=0.0)
