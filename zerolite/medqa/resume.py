"""Checkpoints of a run: what, beside parameters and optimizer, makes it go on as if it had never stopped."""

import os
import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

import zerolite
from zerolite.medqa import processes

DATA = "fingerprint of the tokenised training rows"


@dataclass
class Position:
    """Where a run is, and in which data."""

    step: int  # optimizer steps taken; with the seed it is the position in the data
    seed: int
    global_batch_rows: int
    data: str  # fingerprint of the training examples
    fixed: dict = field(default_factory=dict)  # options, and the base's fingerprint, that a resumed run cannot change


def save(model: nn.Module, folder: Path, optimizer, scheduler, position: Position, frozen: bool = True) -> None:
    """Write a complete checkpoint, or raise CheckpointError and leave none. Every rank must call it.

    frozen=False leaves the frozen base of an adapter out: a resumed run loads it from the same folder again.
    """
    extra = {"position": vars(position), "scheduler": scheduler.state_dict(), "random": random_states()}
    zerolite.save(model, folder, optimizer, extra=extra, frozen=frozen)


def load(model: nn.Module, folder: Path, optimizer, scheduler, here: Position) -> int:
    """Restore what `save` wrote; the step to go on with. Every rank must call it.

    Rates, their schedule and the weight decay are those of this run's options, the step of the schedule the saved one.
    Raises ValueError where the rows, their order, the global batch or what a checkpoint is of are others than those of
    the checkpoint, since its position then means nothing, and CheckpointError where the checkpoint itself is not
    usable. The number of ranks may differ; ranks beyond the saved ones take rank 0's random states.
    """
    settings = [(group["initial_lr"], group["weight_decay"]) for group in optimizer.param_groups]
    extra = zerolite.load(model, folder, optimizer)
    if not isinstance(extra, dict) or not {"position", "scheduler", "random"} <= extra.keys():
        raise ValueError(f"--resume {folder}: this checkpoint was not written by train_medqa.py")
    saved = Position(**extra["position"])
    check_fixed(folder, saved.fixed, here.fixed)
    if saved.global_batch_rows != here.global_batch_rows:
        raise ValueError(f"--resume {folder}: {_other_batch(saved.global_batch_rows, here.global_batch_rows)}")
    check_fixed(folder, {DATA: saved.data}, {DATA: here.data})
    scheduler.load_state_dict({**extra["scheduler"], "base_lrs": [rate for rate, _ in settings]})
    rates = [rate * part(scheduler.last_epoch) for (rate, _), part in zip(settings, scheduler.lr_lambdas, strict=True)]
    for group, (rate, decay), now in zip(optimizer.param_groups, settings, rates, strict=True):
        group.update(initial_lr=rate, weight_decay=decay, lr=now)
    scheduler._last_lr = rates
    set_random_states(extra["random"])
    return saved.step


def check_fixed(folder: Path, there: dict, here: dict) -> None:
    """ValueError, by its name, for what a checkpoint is of and this run says otherwise; both by option."""
    for name, value in there.items():
        if name in here and here[name] != value:
            text = name if " " in name else f"--{name}"
            raise ValueError(
                f"--resume {folder}: {text} was {value} there and is {here[name]} here, so the run cannot go on from "
                "its state and its position in the data: leave that as it was, or start another run"
            )


def _other_batch(there: int, here: int) -> str:
    """What to do where a step has other rows: as long as the options are the same, the number of ranks differs."""
    text = f"rows of an optimizer step (ranks x batch x accumulation) was {there} there and is {here} here"
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if there * num_ranks % here:
        return f"{text}: give the batch and the accumulation of that run, on as many ranks"
    wanted = there * num_ranks // here
    again = processes.command(*sys.argv[1:], num_ranks=wanted)
    return f"{text}; it was a run of {wanted} ranks, if the options are the same: start it with: {again}"


def checkpoints(folder: Path) -> list[Path]:
    """The complete `checkpoint-N` in a folder, by N; a checkpoint gets its name when it is complete."""
    numbered = {
        int(match[1]): path
        for path in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / "manifest.json").is_file()
    }
    return [numbered[number] for number in sorted(numbered)]


def find(folder: Path) -> list[Path]:
    """`folder` alone if it is a checkpoint, else those in it, newest first; ValueError where there is none."""
    if (folder / "manifest.json").is_file():
        return [folder]
    found = checkpoints(folder)
    if not found:
        raise ValueError(
            f"--resume {folder}: expected a checkpoint, or a folder of complete checkpoint-N; there is none"
        )
    return found[::-1]


def load_newest(
    model: nn.Module, found: list[Path], optimizer, scheduler, here: Position, say: Callable[[str], None]
) -> Path:
    """Restore the first of `found` that is whole, and set `here.step`; the checkpoint. Every rank must call it.

    say: is told of each one that is not usable. Raises as `load` does, of the first one where none is whole.
    """
    failures: list[zerolite.CheckpointError] = []
    for folder in found:
        try:
            here.step = load(model, folder, optimizer, scheduler, here)  # damage is found before anything changes
        except zerolite.CheckpointError as error:
            failures.append(error)
            if folder != found[-1]:
                say(f"{folder.name} is not usable, trying an older one: {error}")
            continue
        return folder
    raise failures[0]


def random_states() -> dict:
    """States of the random generators of Python, numpy and torch (CPU, and this rank's GPU), as JSON and tensors."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict) -> None:
    """Set what `random_states` gave; a GPU's state only where there was one and is one."""
    version, internal, gauss_next = states["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
