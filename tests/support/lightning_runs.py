"""A LightningModule and a Fabric loop, run with Lightning's own DDP and with zerolite's strategies."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric import Fabric
from torch import Tensor
from trainer_tasks import CLIP, build, is_syncing, loader, loss_of, optimizer_of, scheduler_of

import zerolite
import zerolite.integrations.lightning
from zerolite.engine.engine import find_engine

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")


@dataclass
class Run:
    losses: list[float] = field(default_factory=list)  # of this rank
    evaluations: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    syncs: list[bool | None] = field(default_factory=list)  # whether a backward reduces; None: DDP's business
    parameters: dict[str, Tensor] = field(default_factory=dict)


class Module(pl.LightningModule):
    """As users write it. Steps call a part of the module, not its forward."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        super().__init__()
        self.net = build(dtype)
        self.run = Run()

    def training_step(self, batch, index):
        inputs, labels = batch
        loss = loss_of(self.net(inputs), labels)
        self.run.losses.append(loss.item())
        self.run.syncs.append(is_syncing(self))
        return loss

    def validation_step(self, batch, index):
        inputs, labels = batch
        self.log("validation", loss_of(self.net(inputs), labels), sync_dist=True, batch_size=1)

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            self.run.evaluations.append(self.trainer.callback_metrics["validation"].item())

    def on_before_zero_grad(self, optimizer):
        self.run.rates.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self):
        optimizer = optimizer_of(self)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler_of(optimizer), "interval": "step"},
        }


def trainer_of(strategy: Any, world: int, folder, **options) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    usual = {"enable_checkpointing": False, "max_epochs": 1, "val_check_interval": 4}
    usual |= {"accumulate_grad_batches": 2, "gradient_clip_val": CLIP, **quiet, **options}
    return pl.Trainer(accelerator="cpu", devices=world, strategy=strategy, default_root_dir=folder, **usual)


def fit(
    strategy: Any,
    world: int,
    folder,
    *,
    module: pl.LightningModule | None = None,
    dtype: torch.dtype = torch.float64,
    load: str | None = None,
    save: str | None = None,
    **options,
) -> Run:
    module = module or Module(dtype)
    trainer = trainer_of(strategy, world, folder, **options)
    trainer.fit(module, loader(world, dtype), loader(world, dtype, seed=6), ckpt_path=load)
    if save is not None:
        trainer.save_checkpoint(save)
    module.run.parameters = parameters_of(module.net if hasattr(module, "net") else module, module)
    return module.run


def parameters_of(part: torch.nn.Module, model: torch.nn.Module) -> dict[str, Tensor]:
    """Copies of a part of a model that is sharded or not. Collective."""
    if find_engine(model) is None:
        return {name: value.detach().clone() for name, value in part.state_dict().items()}
    with zerolite.full_params(model):
        return {name: value.detach().clone() for name, value in part.state_dict().items()}


def fabric_loop(
    strategy: Any,
    world: int,
    *,
    dtype: torch.dtype = torch.float64,
    save: tuple[int, str] | None = None,
    load: str | None = None,
    **options,
) -> Run:
    """Fabric's documented loop. The optimizer and its scheduler are built before `setup`."""
    run = Run()
    fabric = Fabric(accelerator="cpu", devices=world, strategy=strategy, **options)
    fabric.launch()
    plain = build(dtype)
    optimizer = optimizer_of(plain)
    scheduler = scheduler_of(optimizer)
    model, optimizer = fabric.setup(plain, optimizer)
    batches = fabric.setup_dataloaders(loader(world, dtype))
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "update": 0}
    if load is not None:
        fabric.load(load, state)
    done = 2 * state["update"]
    for index, (inputs, labels) in enumerate(batches):
        if index < done:
            continue
        is_accumulating = index % 2 == 0
        with fabric.no_backward_sync(model, enabled=is_accumulating):
            loss = loss_of(model(inputs), labels)
            run.syncs.append(is_syncing(plain))
            fabric.backward(loss / 2)
        run.losses.append(loss.item())
        if is_accumulating:
            continue
        run.norms.append(fabric.clip_gradients(model, optimizer, max_norm=CLIP).item())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        run.rates.append(scheduler.get_last_lr()[0])
        state["update"] += 1
        if save is not None and state["update"] == save[0]:
            fabric.save(save[1], state)
    run.parameters = parameters_of(plain, plain)
    return run
