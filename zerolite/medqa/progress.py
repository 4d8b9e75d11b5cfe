"""What is seen while a run goes on: a progress bar or lines on rank 0, and `metrics.jsonl`."""

import contextlib
import json
import math
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

METRICS = "metrics.jsonl"


class Progress:
    """The bar (lines where stderr is no terminal) and the metrics file of a run; silent on ranks other than 0."""

    def __init__(self, folder: Path, rank: int, first_step: int, num_steps: int):
        self.path = folder / METRICS
        self.is_active = rank == 0
        self.num_steps = num_steps
        self.bar = tqdm(
            total=num_steps,
            initial=first_step,
            disable=not (self.is_active and sys.stderr.isatty()),
            unit="step",
            dynamic_ncols=True,
        )
        if self.is_active:  # a resumed run goes on in the file; what came after the checkpoint is done again
            records = read_metrics(self.path) if first_step else []
            kept = [record for record in records if is_done(record, first_step)]
            written = self.path.with_suffix(".part")
            written.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
            written.replace(self.path)

    def record(self, **values) -> None:
        """One line of metrics.jsonl: `step` and numbers whose names carry their units; NaN and infinity become null."""
        if self.is_active:
            plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(plain) + "\n")

    def advance(self, step: int) -> None:
        self.bar.update(step - self.bar.n)

    def show(self, step: int, **values: str) -> None:
        """The newest numbers, behind the bar or as a line."""
        self.bar.set_postfix(values, refresh=False)
        if self.bar.disable:
            self.print(f"step {step}/{self.num_steps}  " + "  ".join(f"{k} {v}" for k, v in values.items()))

    def print(self, text: str) -> None:
        if self.is_active:
            self.bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        self.bar.close()


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
