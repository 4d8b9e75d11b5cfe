"""Which evaluation of a run was the best: when it ends early, which checkpoints stay, what its result is of.

An evaluation counts where it is one of the schedule (every `--eval_steps`, and the end): the one that a resumed run
makes at its start would else make it end elsewhere than a run that was not stopped. The one before training does not
count: no checkpoint is of it.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import nn

import zerolite
from zerolite.medqa import resume
from zerolite.medqa.arguments import Options
from zerolite.medqa.processes import Processes

BEST = "best.json"


class Best:
    """The validation losses (nats a label token) of a run's evaluations, the same on every rank."""

    def __init__(self, options: Options, folder: Path, num_steps: int, processes: Processes):
        self.options, self.folder, self.num_steps, self.processes = options, folder, num_steps, processes
        self.losses: dict[int, float] = {}  # step -> loss, in the order of steps

    def resume(self, records: list[dict]) -> None:
        """Take the evaluations that rank 0 finds in `records`, of metrics.jsonl. Every rank must call it."""
        found = [(r["step"], r["validation_loss"]) for r in records if r.get("validation_loss") is not None]
        found = found if self.processes.rank == 0 else []
        (num_found, *_) = self.processes.gather(len(found))[0]
        flat = [number for pair in found for number in pair] if found else [0.0] * int(2 * num_found)
        if flat:
            numbers = self.processes.gather(*flat)[0]
            self.losses = {
                int(s): loss for s, loss in zip(numbers[::2], numbers[1::2], strict=True) if self._counts(int(s))
            }

    def add(self, step: int, loss: float) -> None:
        """Count the evaluation of `step`, if it is one of the schedule."""
        if self._counts(step):
            self.losses[step] = loss
            self.write()

    def _counts(self, step: int) -> bool:
        return step > 0 and (step == self.num_steps or step % (self.options.eval_steps or self.num_steps) == 0)

    @property
    def step(self) -> int | None:
        """Of the lowest loss, the first of equal ones."""
        return min(self.losses, key=self.losses.__getitem__, default=None)

    @property
    def num_since(self) -> int:
        """Evaluations since the best one."""
        best = self.step or 0
        return sum(step > best for step in self.losses)

    @property
    def is_exhausted(self) -> bool:
        """Whether `--early_stopping_patience` ends the run."""
        patience = self.options.early_stopping_patience
        return patience is not None and self.num_since >= patience

    def checkpoint(self) -> Path | None:
        """The checkpoint of the lowest loss, of those that are here."""
        evaluated = [
            (self.losses[step], path)
            for path in resume.checkpoints(self.folder)
            if (step := step_of(path)) in self.losses
        ]
        return min(evaluated, key=lambda pair: pair[0], default=(0.0, None))[1]

    def write(self) -> None:
        """Write `best.json`, on rank 0: the best evaluation, and its checkpoint where there is one."""
        if self.processes.rank != 0 or self.step is None:
            return
        checkpoint = self.folder / f"checkpoint-{self.step}"
        name = checkpoint.name if checkpoint in resume.checkpoints(self.folder) else None
        values = {"step": self.step, "validation_loss": self.losses[self.step], "checkpoint": name}
        written = (self.folder / BEST).with_suffix(".part")
        written.write_text(json.dumps(values) + "\n", encoding="utf-8")
        written.replace(self.folder / BEST)

    def remove_oldest(self, newest: Path) -> None:
        """Once `newest` is complete, remove the oldest checkpoints beyond `--save_total_limit`, on rank 0.

        Never `newest` and never the best. A checkpoint loses its name before its files: what is called checkpoint-N is
        complete whenever the process is killed, and a resumed run removes the rest.
        """
        if self.processes.rank != 0:
            return
        self.write()
        found, limit = resume.checkpoints(self.folder), self.options.save_total_limit
        old = [path for path in found if path not in (newest, self.checkpoint())]
        for path in old[: max(len(found) - limit, 0)] if limit is not None else []:
            nameless = path.with_name(f".{path.name}.tmp-removed")
            try:
                os.rename(path, nameless)
            except OSError as error:
                self.processes.print(f"{path}: cannot be removed ({error.strerror}), so --save_total_limit is exceeded")
                continue
            shutil.rmtree(nameless, ignore_errors=True)

    def load(self, model: nn.Module, step: int) -> int:
        """Have `model`, which is that of `step`, be the best one that was kept; its step. Every rank must call it.

        One that cannot be read is told, and `step` stays.
        """
        checkpoint = self.checkpoint()  # rank 0's counts: others may see a folder on another machine late
        chosen = step_of(checkpoint) if checkpoint and self.losses[step_of(checkpoint)] < self.losses[step] else step
        chosen = int(self.processes.gather(chosen)[0][0])
        if chosen == step:
            return step
        path = self.folder / f"checkpoint-{chosen}"
        try:
            zerolite.load(model, path)
        except zerolite.CheckpointError as error:
            self.processes.print(f"the best checkpoint {path} cannot be read, so the result is of step {step}: {error}")
            return step
        return chosen

    def told(self, last_step: int, result_step: int) -> "Ended":
        """How the run ended, for its report."""
        sentences = []
        if last_step < self.num_steps:
            sentences.append(
                f"Ended at step {last_step} of {self.num_steps}: {self.num_since} evaluations in a row did not improve "
                f"the validation loss (`--early_stopping_patience {self.options.early_stopping_patience}`)."
            )
        if self.step is not None:
            sentences.append(f"Lowest validation loss: {self.losses[self.step]:.4f} at step {self.step}.")
        sentences.append(f"The result is the model of step {result_step}.")
        return Ended(result_step, " ".join(sentences))


@dataclass(frozen=True)
class Ended:
    """What a run's result is of, and why: for people."""

    step: int
    text: str


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))
