"""The timeline's table and picture from a Chrome trace whose times are known."""

import json
import subprocess
import sys

import pytest
from paths import ROOT

SCRIPT = ROOT / "benchmarks" / "timeline.py"
THREADS = {1: "MainThread", 2: "forward in flight", 3: "all-gather in flight", 4: "thread 0", 5: "stream 7"}


def write_trace(folder, events: list[tuple]) -> None:
    """events: (thread, kind, name, begin, end) in milliseconds."""
    names = [
        {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}
        for tid, thread in THREADS.items()
        for pid in [9 if thread == "thread 0" else 8]
        for what, name in [("thread_name", thread), ("process_name", "rank 3 worker 0" if pid == 9 else "rank 3")]
    ]
    spans = [
        {"ph": "X", "name": "", "cat": kind, "pid": 9 if tid == 4 else 8, "tid": tid, "ts": 1000 * (7000 + begin),
         "dur": 1000 * (end - begin), "args": {"name": name}}
        for tid, kind, name, begin, end in events
    ]  # fmt: skip
    (folder / "rank-00003.json").write_text(json.dumps({"traceEvents": names + spans}))


STEPS = [
    (1, "optimizer step", "AdamW", 0, 10),
    (1, "optimizer step", "layers.0", 2, 4),  # inside the step
    (4, "worker step", "stepping layers.0", 5, 25),
    (2, "forward", "layers.0", 20, 40),
    (3, "all-gather", "layers.1", 30, 60),
    (1, "unshard", "layers.1", 40, 60),
    (1, "worker step wait", "layers.1", 40, 50),
    (1, "H2D", "layers.1", 50, 51),
    (5, "H2D", "layers.1", 52, 58),  # the stream's own time counts
    (1, "optimizer step", "AdamW", 70, 80),
]


def run(folder, *options: str) -> list[list[str]]:
    command = [sys.executable, SCRIPT, folder, "--rank", "3", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (folder / "rank-00003.png").stat().st_size > 5_000
    return [line.rsplit(maxsplit=3) for line in done.stdout.splitlines()[1:]]


@pytest.fixture
def folder(tmp_path):
    write_trace(tmp_path, STEPS)
    return tmp_path


def test_the_table_says_what_overlaps(folder):
    """How long each row runs, and how much of it while blocks compute."""
    rows = {" ".join(line): line for line in (" ".join(cells).split() for cells in run(folder))}
    text = "\n".join(rows)
    assert "forward, backward, step 2 20.0" in text
    assert "blocks compute 1 20.0" in text
    assert "blocks wait to begin 1 20.0 0%" in text
    assert "all-gather in flight 1 30.0 33%" in text
    assert "parameters: host to device 1 6.0 0%" in text
    assert "trainer sleeps for workers 1 10.0 0%" in text
    assert "worker 0 1 20.0 25%" in text


def test_the_last_steps_are_chosen(folder):
    """One step: what came after the end of the one before."""
    text = "\n".join(" ".join(" ".join(cells).split()) for cells in run(folder, "--steps", "1"))
    assert "forward, backward, step 1 10.0" in text
    assert "worker 0 1 15.0 33%" in text
