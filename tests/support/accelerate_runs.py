"""A script with Accelerate's loop, run with its own Accelerator and with zerolite's: see trainer_tasks.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import accelerate
import torch
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor
from trainer_tasks import CLIP, build, is_syncing, loader, loss_of, optimizer_of, scheduler_of

from zerolite.integrations.accelerate import Accelerator


@dataclass
class Run:
    """What a script logs, and the parameters that it ends with, on the main process."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    evaluations: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    syncs: list[bool | None] = field(default_factory=list)  # whether a backward reduces; None: DDP's business
    parameters: dict[str, Tensor] = field(default_factory=dict)


def accelerator_of(zero: dict[str, Any] | None, **options) -> accelerate.Accelerator:
    """A new one; Accelerate keeps its state in singletons."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    options.setdefault("cpu", True)  # else Accelerate takes ranks on CPUs for programs of their own
    if "gradient_accumulation_plugin" not in options:
        options.setdefault("gradient_accumulation_steps", 2)
    return accelerate.Accelerator(**options) if zero is None else Accelerator(zero=zero, **options)


def train(
    zero: dict[str, Any] | None,
    *,
    dtype: torch.dtype = torch.float64,
    save_at: tuple[int, str] | None = None,
    load: tuple[int, str] | None = None,
    prepared_by=None,
    wrap=lambda model: model,
    **options,
) -> Run:
    """zero: None for a plain Accelerator, which wraps in DDP. save_at, load: an update's number, and a folder.

    prepared_by: called with the accelerator; wrap: called with the model, before it is prepared.
    """
    run, accelerator = Run(), accelerator_of(zero, **options)
    if prepared_by is not None:
        prepared_by(accelerator)
    model = wrap(build(dtype))
    optimizer = optimizer_of(model)
    scheduler = scheduler_of(optimizer)
    world = accelerator.num_processes
    batches, evaluation = loader(world, dtype), loader(world, dtype, seed=6)
    optimizer, model, batches, evaluation, scheduler = accelerator.prepare(
        optimizer, model, batches, evaluation, scheduler
    )
    update = 0
    if load is not None:
        update = load[0]
        accelerator.load_state(load[1])
        batches = accelerator.skip_first_batches(batches, 2 * update)
    for inputs, labels in batches:
        with accelerator.accumulate(model):
            loss = loss_of(model(inputs), labels)
            run.syncs.append(is_syncing(model))
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                run.norms.append(accelerator.clip_grad_norm_(model.parameters(), CLIP).item())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        run.losses.append(loss.item())
        if accelerator.sync_gradients:
            update += 1
            run.rates.append(scheduler.get_last_lr()[0])
            if save_at is not None and update == save_at[0]:
                accelerator.save_state(save_at[1])
        if len(run.losses) % 4 == 0:
            run.evaluations.append(evaluate(accelerator, model, evaluation))
    run.parameters = accelerator.get_state_dict(model)
    return run


def evaluate(accelerator: accelerate.Accelerator, model, batches) -> float:
    model.eval()
    with torch.no_grad():
        losses = [accelerator.gather_for_metrics(loss_of(model(x), y).reshape(1)) for x, y in batches]
    model.train()
    return torch.cat(losses).mean().item()
