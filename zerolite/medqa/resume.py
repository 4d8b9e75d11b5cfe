"""Checkpoints of a run: what, beside parameters and optimizer, makes it go on as if it had never stopped."""

import random
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

import zerolite


@dataclass
class Position:
    """Where a run is, and in which data."""

    step: int  # optimizer steps taken; with the seed it is the position in the data
    seed: int
    global_batch_rows: int
    data: str  # fingerprint of the training examples


def save(model: nn.Module, folder: Path, optimizer, scheduler, position: Position, frozen: bool = True) -> None:
    """Write a complete checkpoint, or raise CheckpointError and leave none. Every rank must call it.

    frozen=False leaves the frozen base of an adapter out: a resumed run loads it from the same folder again.
    """
    extra = {"position": vars(position), "scheduler": scheduler.state_dict(), "random": random_states()}
    zerolite.save(model, folder, optimizer, extra=extra, frozen=frozen)


def load(model: nn.Module, folder: Path, optimizer, scheduler, here: Position) -> int:
    """Restore what `save` wrote; the step to go on with. Every rank must call it.

    Raises ValueError where the rows, their order or the global batch are others than those of the checkpoint, since
    its position then means nothing, and CheckpointError where the checkpoint itself is not usable. The number of
    ranks may differ; ranks beyond the saved ones take rank 0's random states.
    """
    extra = zerolite.load(model, folder, optimizer)
    if not isinstance(extra, dict) or not {"position", "scheduler", "random"} <= extra.keys():
        raise ValueError(f"--resume {folder}: this checkpoint was not written by train_medqa.py")
    saved = Position(**extra["position"])
    for name, text in (
        ("seed", "--seed"),
        ("global_batch_rows", "rows of an optimizer step (ranks x batch x accumulation)"),
        ("data", "fingerprint of the tokenised training rows"),
    ):
        if getattr(saved, name) != getattr(here, name):
            raise ValueError(
                f"--resume {folder}: {text} was {getattr(saved, name)} there and is {getattr(here, name)} here, so "
                "the run cannot go on from its position in the data"
            )
    scheduler.load_state_dict(extra["scheduler"])
    set_random_states(extra["random"])
    return saved.step


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


def claim_output(folder: Path, is_resumed: bool) -> None:
    """Make the output folder and see that it can be written; on rank 0.

    Where the run goes on, what a run that was killed in a save left beside its checkpoints is removed: this one may
    never save that step.

    Raises ValueError where it cannot, and where it holds checkpoints that this run does not go on from: a later
    `--resume` would take them for its own.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--output_dir {folder}: cannot be written: {error.strerror}") from error
    for left in folder.glob(".checkpoint-*.tmp-*") if is_resumed else ():
        if ".tmp-old-" not in left.name:  # that one was complete, and `zerolite.load` puts it back
            shutil.rmtree(left, ignore_errors=True)
    if not is_resumed and (found := checkpoints(folder)):
        raise ValueError(
            f"--output_dir {folder}: holds {found[-1].name} of an earlier run; go on from it with --resume {folder}, "
            "or name another folder"
        )


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
