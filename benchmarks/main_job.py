"""train_medqa.py as its user runs it, for benchmarks that compare whole runs."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from harness import RankError

ROOT = Path(__file__).parent.parent


class Job(NamedTuple):
    """What one run left."""

    validation_losses: dict[int, float]  # nats a label token, by step
    tokens_per_second: float  # median over the lines of its metrics
    memory: dict[str, int]  # rank 0's row of the memory table: column -> bytes

    @property
    def first_loss(self) -> float:
        return self.validation_losses[min(self.validation_losses)]

    @property
    def last_loss(self) -> float:
        return self.validation_losses[max(self.validation_losses)]


def run(name: str, ranks: int, options: list[str]) -> Job:
    """Run the main job on `ranks` processes in a folder of its own, which is removed; RankError where it fails."""
    with tempfile.TemporaryDirectory(prefix="zerolite-job-") as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [sys.executable, *launcher, "train_medqa.py", "--output_dir", folder, *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise RankError(f"{name}: exit code {done.returncode}\n{done.stderr[-3000:]}")
        records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        (memory, *_) = json.loads((Path(folder) / "memory.json").read_text())["bytes_of_each_rank"]
    losses = {record["step"]: record["validation_loss"] for record in records if "validation_loss" in record}
    speeds = [record["tokens_per_second"] for record in records if "loss" in record]
    return Job(losses, statistics.median(speeds), memory)
