"""The end of a run: its result, or a checkpoint where that cannot be written, so that no training is lost."""

from collections.abc import Callable
from pathlib import Path

import zerolite
from zerolite.medqa import processes, resume
from zerolite.medqa.processes import Processes


class NotWritten(zerolite.ZeroliteError):
    """The run is trained and its result is not written; the same on every rank."""


def result_or_checkpoint(
    write: Callable[[], Path], save: Callable[[], Path], folder: Path, step: int, ranks: Processes
) -> Path:
    """What `write` has written. Every rank must call it.

    Raises NotWritten where some rank could not, with a checkpoint of `step` in `folder`, which `save` writes unless it
    is there, and with the command that tries again.
    """
    failure: Exception | None = None
    result = folder
    try:
        result = write()
    except (OSError, ValueError, zerolite.ZeroliteError) as error:
        failure = error
    if not any(ranks.sum(failure is not None)):
        return result
    why = str(failure or "another rank could not write")
    again = processes.command("--resume", str(folder))
    there = [path for path in resume.checkpoints(folder) if path.name == f"checkpoint-{step}"]
    try:
        kept = there[0] if there else save()
    except (OSError, zerolite.ZeroliteError) as error:
        older = resume.checkpoints(folder)
        rest = f"the newest checkpoint is {older[-1]}" if older else "there is no checkpoint"
        raise NotWritten(f"the result cannot be written: {why}; nor can a checkpoint: {error}; {rest}") from failure
    raise NotWritten(
        f"the result cannot be written: {why}; the training is kept in {kept}: when that is mended, write it with: "
        f"{again}"
    ) from failure
