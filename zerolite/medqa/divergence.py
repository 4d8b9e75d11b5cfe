"""When a run is to stop because it learns nothing more: steps that are all skipped, and a loss that is no number."""

import math
from pathlib import Path

import zerolite
from zerolite.medqa import resume

MAX_SKIPPED = 10  # in a row
MAX_SKIPPED_FP16 = 16  # a loss scale skips steps to find its height, from 2 ** 16; below 1 the optimizer gives up


class Diverged(zerolite.ZeroliteError):
    """The run has learned nothing for a while and would not again; the same on every rank."""


class Divergence:
    """Watches the steps of a run whose checkpoints lie in `folder`."""

    def __init__(self, folder: Path, precision: str):
        self.folder, self.precision = folder, precision
        self.max_in_a_row = MAX_SKIPPED_FP16 if precision == "fp16" else MAX_SKIPPED
        self.num_skipped = 0  # in all
        self.num_in_a_row = 0

    def add(self, step: int, optimizer) -> None:
        """Count step number `step`, just made. Diverged where too many in a row were skipped."""
        if not optimizer.step_was_skipped:
            self.num_in_a_row = 0
            return
        self.num_skipped += 1
        self.num_in_a_row += 1
        if self.num_in_a_row >= self.max_in_a_row:
            raise self._error(step, f"{self._skipped(optimizer)} in a row")

    def check_result(self, step: int, num_taken: int, optimizer) -> None:
        """Diverged where a run comes to its end without one step taken: there is no result."""
        if self.num_skipped and not num_taken:
            raise self._error(step, f"{self._skipped(optimizer)}, every one that was made: there is no result")

    def check_loss(self, step: int, loss: float) -> None:
        """Diverged for a validation loss that is NaN or infinite."""
        if not math.isfinite(loss):
            raise self._error(step, f"the validation loss is {loss}: weights or activations are not finite")

    def _skipped(self, optimizer) -> str:
        units = optimizer.skipped_units
        where = f"{', '.join(units[:4])}{' and others' if len(units) > 4 else ''}" if units else "some units"
        return f"{self.num_in_a_row} steps were skipped because gradients of {where} held Inf or NaN"

    def _error(self, step: int, what: str) -> Diverged:
        found = resume.checkpoints(self.folder)
        where = f"the last checkpoint is {found[-1]}" if found else "there is no checkpoint"
        help = "a lower --learning_rate or --precision bf16 may help"
        if step == 0:  # nothing was learned yet
            help = f"the model came so: its files are damaged, or its numbers are beyond --precision {self.precision}"
        return Diverged(f"stopped at step {step}: {what}; {where}; {help}")
