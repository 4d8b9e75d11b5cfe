"""How a run that was stopped goes on: options given beside `--resume` are applied, or refused by name."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from torch import nn

from zerolite.medqa import resume
from zerolite.medqa.arguments import Options, options_file, read_config
from zerolite.medqa.opening import print_of

# What the state in a checkpoint is of. All other options are applied, but for those of the data, whose tokenised rows
# are compared, and of the base, whose fingerprint is: files may have moved.
FIXED = (
    "finetuning_type",
    "freeze_vision_tower",
    "lora_rank",
    "lora_alpha",
    "lora_target",
    "use_rslora",
    "use_dora",
    "loraplus_lr_ratio",
    "num_virtual_tokens",
    "prompt_init",
    "prompt_init_text",
    "prompt_encoder",
    "optim",
    "seed",
)
BASE = "fingerprint of the base (--model_name_or_path)"
UNSEEN = ("resume", "output_dir")  # differ by nature


def fixed_of(options: Options) -> dict:
    """What a resumed run cannot change, by name, as JSON has it."""
    chosen = {name: getattr(options, name) for name in FIXED}
    base = options.model_name_or_path
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in chosen.items()}
    return {**plain, BASE: "none: from scratch" if base is None else print_of([Path(base)])}


def find(options: Options) -> list[Path]:
    """The checkpoints to go on from, newest first; none where nothing is resumed.

    Raises ValueError where there are none, and for an option that the run of their folder had otherwise.
    """
    if options.resume is None:
        return []
    found = resume.find(Path(options.resume))
    before = _before(options)
    if before is not None:
        there = {name: getattr(before, name) for name in FIXED}
        resume.check_fixed(Path(options.resume), there, {name: getattr(options, name) for name in FIXED})
    return found


def changes(options: Options) -> str | None:
    """Options that are not those of the resumed run, for people; `options` with their defaults filled in."""
    before = _before(options) if options.resume is not None else None
    if before is None:
        return None
    pairs = [(name, getattr(before, name), value) for name, value in vars(options).items() if name not in UNSEEN]
    told = [f"--{name} {there} -> {here}" for name, there, here in pairs if there != here]
    return f"other options than before: {'; '.join(told)}" if told else None


def _before(options: Options) -> Options | None:
    """The options of the run that left what is resumed, if they lie there."""
    file = options_file(Path(options.resume))
    return None if file is None else dataclasses.replace(Options(), **read_config(file))


def go_on(
    model: nn.Module,
    found: list[Path],
    optimizer,
    scheduler,
    position: resume.Position,
    num_steps: int,
    say: Callable[[str], None],
) -> None:
    """Restore the newest checkpoint that is whole, and set the position. Every rank must call it.

    Raises as `resume.load_newest`, and ValueError where the run was to end before the step that it is at.
    """
    checkpoint = resume.load_newest(model, found, optimizer, scheduler, position, say)
    if position.step > num_steps:
        raise ValueError(
            f"--resume {checkpoint}: {position.step} steps are taken there, and this run is to end after {num_steps}: "
            "give more --max_steps or --num_train_epochs, or name an earlier checkpoint"
        )
    say(f"resumed from {checkpoint} at step {position.step}")
