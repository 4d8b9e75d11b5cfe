"""What is seen while a run goes on: a progress bar or lines on rank 0, and `metrics.jsonl`."""

import contextlib
import datetime
import json
import math
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from zerolite.medqa.machine import HostMemory, about, duration
from zerolite.medqa.processes import Processes
from zerolite.medqa.trackers import Trackers

METRICS = "metrics.jsonl"


class Progress:
    """The bar (lines where stderr is no terminal), the metrics file and the trackers of a run; silent but on rank 0.

    As a context manager it starts and ends the trackers, also where the run fails.
    """

    def __init__(self, folder: Path, rank: int, first_step: int, num_steps: int, trackers: Trackers | None = None):
        self.path = folder / METRICS
        self.is_active = rank == 0
        self.first_step, self.num_steps = first_step, num_steps
        self.started = datetime.datetime.now(datetime.timezone.utc)
        self.timed_from: tuple[int, float] | None = None  # the first step, which compiles and allocates, tells nothing
        self.host_memory = HostMemory()  # before a tracker starts a process
        self.trackers = trackers
        self.records: list[dict] = []  # on rank 0: what was recorded before a resumed run was stopped
        self.bar = tqdm(
            total=num_steps,
            initial=first_step,
            disable=not (self.is_active and sys.stderr.isatty()),
            unit="step",
            dynamic_ncols=True,
        )
        if self.is_active:  # a resumed run goes on in the file; what came after the checkpoint is done again
            records = read_metrics(self.path) if first_step else []
            self.records = [record for record in records if is_done(record, first_step)]
            written = self.path.with_suffix(".part")
            written.write_text("".join(json.dumps(record) + "\n" for record in self.records), encoding="utf-8")
            written.replace(self.path)
            if trackers is not None:
                trackers.skip(records)

    def record(self, **values) -> None:
        """One line of metrics.jsonl: `step` and numbers whose names carry their units; NaN and infinity become null."""
        if self.is_active:
            plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(plain) + "\n")
            if self.trackers is not None:
                self.trackers.log(plain)

    def advance(self, step: int) -> None:
        self.bar.update(step - self.bar.n)
        if self.timed_from is None:
            self.timed_from = step, time.perf_counter()

    def left(self, step: int) -> str | None:
        """The time to the last step, at the pace so far with evaluations and checkpoints; None at the first step."""
        first, started_s = self.timed_from or (step, 0.0)
        if step == first:
            return None
        return duration((self.num_steps - step) * (time.perf_counter() - started_s) / (step - first))

    def show(self, step: int, values: dict) -> None:
        """The newest numbers, as `record` takes them, behind the bar or as a line."""
        shown = {
            "loss": f"{values['loss']:.4f}",
            "lr": f"{values['learning_rate']:.2e}",
            "grad_norm": f"{values['grad_norm']:.3f}",
            "tokens_s": f"{values['tokens_per_second']:.0f}",
            "peak_MiB": f"{values['peak_memory_bytes'] / 2**20:.0f}",
        }
        if values["num_skipped_steps"]:
            shown["skipped"] = str(values["num_skipped_steps"])
        self.bar.set_postfix(shown, refresh=False)
        if self.bar.disable:
            if left := self.left(step):
                shown["left"] = left
            self.print(f"step {step}/{self.num_steps}  " + "  ".join(f"{k} {v}" for k, v in shown.items()))

    def print(self, text: str) -> None:
        if self.is_active:
            self.bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def about(self, processes: Processes, last_step: int) -> str:
        return about(processes, self.started, self.first_step, last_step)

    def close(self, has_failed: bool = False) -> None:
        self.bar.close()
        if self.trackers is not None:
            self.trackers.close(has_failed)
            self.trackers = None

    def __enter__(self) -> "Progress":
        if self.trackers is not None:
            self.trackers.start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.close(has_failed=kind is not None)


class Meter:
    """Sums since the last logged step: loss, label tokens, tokens read and seconds."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.loss_sum, self.num_labels, self.num_tokens, self.started_s = 0.0, 0, 0, time.perf_counter()

    def add(self, num_labels: int, num_tokens: int) -> None:
        self.num_labels += num_labels
        self.num_tokens += num_tokens

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Seconds inside count for nothing."""
        paused_s = time.perf_counter()
        yield
        self.started_s += time.perf_counter() - paused_s

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / (time.perf_counter() - self.started_s)


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics file; none where it is missing.

    A line that is no record, which a full disk or a power loss leaves at the end, is left out with a warning.
    """
    if not path.is_file():
        return []
    records, dropped = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            record = json.loads(line) if line else None
        except (ValueError, RecursionError):
            record = line
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        elif line:
            dropped.append(number)
    if dropped:
        told = ", ".join(map(str, dropped[:4])) + (" and others" if len(dropped) > 4 else "")
        warnings.warn(f"{path}: no record in line {told}, which a run that was cut off left: left out", stacklevel=2)
    return records


def is_done(record: dict, first_step: int) -> bool:
    """Whether a run that goes on at `first_step` does not do again what the record is of: it validates there anew."""
    return record["step"] < first_step or (record["step"] == first_step and "validation_loss" not in record)
