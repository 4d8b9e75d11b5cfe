"""One training run, described; carried out by zerolite on the ranks and by plain torch on one process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from models import build, divide_gradients, joint_batch, loss_of, part, whole
from torch import Tensor, nn


@dataclass(frozen=True)
class Trial:
    model: str = "llama"
    dtype: torch.dtype = torch.float64
    steps: int = 4
    accumulation: int = 1
    no_sync: bool = True  # while accumulating
    max_grad_norm: float | None = None
    two_groups: bool = False
    schedule: bool = False
    checkpointing: str | None = None  # "reentrant" or "non-reentrant"
    mesh: tuple[int, ...] | None = None
    lr: float = 1e-2


@dataclass(frozen=True)
class Result:
    parameters: dict[str, Tensor]
    norms: tuple[float, ...]


def make(trial: Trial) -> nn.Module:
    model = build(trial.model, trial.dtype)
    if trial.checkpointing:
        options = {"use_reentrant": trial.checkpointing == "reentrant"}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return model


def parameter_groups(trial: Trial, model: nn.Module) -> Iterator[nn.Parameter] | list[dict]:
    if not trial.two_groups:
        return model.parameters()
    parameters = list(model.parameters())
    return [
        {"params": [parameter for parameter in parameters if parameter.dim() > 1], "weight_decay": 0.1},
        {
            "params": [parameter for parameter in parameters if parameter.dim() == 1],
            "lr": trial.lr / 3,
            "weight_decay": 0.0,
        },
    ]


def scheduler_for(trial: Trial, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    factor = (lambda step: 1.0 / (1 + step)) if trial.schedule else (lambda step: 1.0)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def mesh_of(trial: Trial):
    if trial.mesh is None:
        return None
    names = ("replicate", "shard")[-len(trial.mesh) :]
    return dist.init_device_mesh("cpu", trial.mesh, mesh_dim_names=names)


def train(trial: Trial, stage: int) -> Result:
    """On a rank: its share of each joint batch, through zerolite."""
    import zerolite

    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model = zerolite.shard(
        make(trial), stage=stage, mesh=mesh_of(trial), precision=zerolite.Precision(trial.dtype, trial.dtype)
    )
    optimizer = zerolite.AdamW(parameter_groups(trial, model), lr=trial.lr, max_grad_norm=trial.max_grad_norm)
    scheduler = scheduler_for(trial, optimizer)
    norms = []
    for step in range(trial.steps):
        for micro in range(trial.accumulation):
            batch = joint_batch(trial.model, step * trial.accumulation + micro, trial.dtype)
            with zerolite.no_sync(model, enabled=trial.no_sync and micro + 1 < trial.accumulation):
                loss_of(model, part(batch, rank, world)).backward()
        optimizer.step()
        scheduler.step()
        norms.append(optimizer.grad_norm)
        optimizer.zero_grad()
    with zerolite.full_params(model):
        return Result(whole(model), tuple(norms))


@cache
def reference(trial: Trial, world: int) -> Result:
    """The same on one process with plain torch."""
    model = make(trial)
    optimizer = torch.optim.AdamW(parameter_groups(trial, model), lr=trial.lr)
    scheduler = scheduler_for(trial, optimizer)
    norms = []
    for step in range(trial.steps):
        for micro in range(trial.accumulation):
            loss_of(model, joint_batch(trial.model, step * trial.accumulation + micro, trial.dtype)).backward()
        divide_gradients(model, world)
        limit = float("inf") if trial.max_grad_norm is None else trial.max_grad_norm
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), limit).item())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return Result(whole(model), tuple(norms))
