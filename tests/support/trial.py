"""One training run, described; carried out by zerolite on the ranks and by plain torch on one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.distributed as dist
from models import FACTORIES, build, divide_gradients, joint_batch, llama, loss_of, part, whole
from torch import Tensor, nn

# Each half of a block has several of the parts that workers divide it in; a smaller model leaves all but one idle.
FACTORIES["llama-wide"] = lambda: llama(hidden=64)

HALF = "1"  # an Offload's budget: what `budget_for_half` says on the rank


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
    optimizer: str = "AdamW"
    reduce: torch.dtype | None = None  # None: `dtype`
    frozen: str | None = None  # part of the names that are
    offload: object = None  # a zerolite.Offload; it and what follows change no number, and plain torch has none of it
    bucket_numel: int | None = None
    read: bool = False  # all parameters right after each step: nothing comes back just in time


@dataclass(frozen=True)
class Result:
    parameters: dict[str, Tensor]
    norms: tuple[float, ...]
    buckets: tuple[int, int] = (0, 0)  # trainable ones: that workers step, in all


def make(trial: Trial) -> nn.Module:
    model = build(trial.model, trial.dtype)
    if trial.checkpointing:
        options = {"use_reentrant": trial.checkpointing == "reentrant"}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trial.frozen is None or trial.frozen not in name)
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


@contextmanager
def buckets_of(numel: int | None) -> Iterator[None]:
    """Buckets of at most so many elements; None: as they are."""
    from zerolite.shards import units

    before, units.BUCKET_NUMEL = units.BUCKET_NUMEL, numel or units.BUCKET_NUMEL
    try:
        yield
    finally:
        units.BUCKET_NUMEL = before


def budget_for_half(trial: Trial, stage: int) -> int:
    """On a rank: the device bytes that hold the model and half of what could leave it."""
    import zerolite
    from zerolite.offload.placement import Policy, device_bytes
    from zerolite.shards.units import plan_units

    def dtype_of(parameter):
        return trial.dtype

    plans = plan_units(make(trial), None, dtype_of)
    engine = zerolite.shard(make(trial), stage=stage)._zerolite
    policy = Policy(engine.partition, engine.mesh.shard.size, precision_of(trial), dtype_of)
    least, most = (sum(device_bytes(plan, policy, offload) for plan in plans) for offload in (zerolite.Offload(), None))
    return (least + most) // 2


def precision_of(trial: Trial):
    import zerolite

    return zerolite.Precision(trial.dtype, trial.reduce or trial.dtype)


def start(trial: Trial, stage: int):
    """On a rank: the sharded model and its optimizer."""
    import zerolite

    options = {"mesh": mesh_of(trial), "offload": trial.offload, "precision": precision_of(trial)}
    with buckets_of(trial.bucket_numel):
        if trial.offload is not None and trial.offload.budget == HALF:
            options["offload"] = replace(trial.offload, budget=budget_for_half(trial, stage))
        model = zerolite.shard(make(trial), stage=stage, **options)
    rule = getattr(zerolite, trial.optimizer)
    return model, rule(parameter_groups(trial, model), lr=trial.lr, max_grad_norm=trial.max_grad_norm)


def train(trial: Trial, stage: int) -> Result:
    """On a rank: its share of each joint batch, through zerolite."""
    import zerolite

    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model, optimizer = start(trial, stage)
    scheduler = scheduler_for(trial, optimizer)
    norms = []
    for step in range(trial.steps):
        for micro in range(trial.accumulation):
            batch = joint_batch(trial.model, step * trial.accumulation + micro, trial.dtype)
            with zerolite.no_sync(model, enabled=trial.no_sync and micro + 1 < trial.accumulation):
                loss_of(model, part(batch, rank, world)).backward()
        optimizer.step()
        if trial.read:
            list(model.parameters())
        scheduler.step()
        norms.append(optimizer.grad_norm)
        optimizer.zero_grad()
    on_host = [bucket.shard.steps_in_background for bucket in model._zerolite.reducer.order]
    with zerolite.full_params(model):
        return Result(whole(model), tuple(norms), (sum(on_host), len(on_host)))


def train_each(trials: list[tuple[Trial, int]]) -> list[Result]:
    """On a rank: one trial after the other, each at its stage."""
    return [train(trial, stage) for trial, stage in trials]


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
