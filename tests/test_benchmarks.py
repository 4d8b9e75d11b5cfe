"""Benchmarks run from end to end on a tiny model; what they write is complete, and its losses agree."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(script: str, arguments: str, output: Path) -> str:
    """Run a benchmark on two ranks of the CPU; what it prints."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # two ranks, also where there is one GPU
    command = [sys.executable, ROOT / "benchmarks" / script, *arguments.split(), "--output", output]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_zero_step_writes_complete_results(tmp_path):
    """Two ranks, DDP and zerolite's stage 2: every field is there, the losses are those of one process."""
    run("zero_step.py", "--size tiny --ranks 2 --steps 2 --repeats 1 --modes zerolite2", tmp_path)
    path = tmp_path / "zero_step_tiny_fp32_cpu.json"
    report = json.loads(path.read_text())
    assert {"cpu", "cores", "memory_gib", "gpu", "versions", "commit", "date", "command"} <= report["facts"].keys()
    assert report["settings"]["ranks"] == 2 and len(report["noise"]) == 1
    assert [row["mode"] for row in report["rows"]] == ["ddp", "zerolite2"]
    for row in report["rows"]:
        assert row["step_seconds"]["median"] > 0 and row["step_to_ddp"]["median"] > 0
        assert row["memory"].keys() == {"forward", "backward", "step"} and row["peak"] > 0
        assert row["max_loss_difference"] < 1e-4
        assert all(math.isfinite(loss) for loss in row["losses"])
        # Both move every gradient and every parameter once, whichever collectives they choose.
        assert math.isclose(row["sent_bytes"], 4 * report["parameters"], rel_tol=0.1)
        # The ideal, plus the rotary tables, the batches and stage 2's padding.
        assert row["bytes_per_parameter"]["backward"] <= 1.05 * row["ideal_bytes_per_parameter"]

    text = path.with_suffix(".md").read_text()
    assert "zerolite2" in text and str(tmp_path) not in text + path.read_text()
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_offload_writes_complete_results(tmp_path):
    """zerolite with and without offload, accumulating and clipping: the same losses, and every byte counted once."""
    arguments = (
        "--model tiny --steps 2 --repeats 1 --accumulation 2 --clip 0.5 --modes zerolite_offload torchao_offload"
    )
    printed = run("offload.py", arguments, tmp_path)
    assert "torchao_offload did not run: " in printed

    path = tmp_path / "offload_tiny_fp32_cpu.json"
    report = json.loads(path.read_text())
    (table,) = report["tables"]
    base, offloaded = table["rows"]
    assert (base["mode"], offloaded["mode"]) == ("zerolite", "zerolite_offload") and len(table["noise"]) == 1
    assert offloaded["max_loss_difference"] == 0.0 and all(math.isfinite(loss) for loss in offloaded["losses"])
    assert offloaded["practicality"]["median"] > 0 and offloaded["tokens_per_second"] > 0
    assert base["exposed_seconds"]["workers"] == 0 < offloaded["exposed_seconds"]["step"]
    half = 4 * report["parameters"] / 2  # of two ranks, in fp32
    near = {"rel_tol": 0.02}  # and padding
    assert math.isclose(offloaded["bus_bytes"]["down"], 2 * half, **near)  # each of two micro-batches
    assert math.isclose(offloaded["bus_bytes"]["up"], half, **near)
    assert math.isclose(base["memory"]["states"]["device"], 4 * half + half, **near)  # 4 + 4/N + 8/N bytes, N = 2
    assert math.isclose(offloaded["memory"]["states"]["device"], 2 * half, **near)
    rows = {row for row, *_ in table["spans"]["zerolite_offload"]}
    assert {"phase", "unit", "wait", "down", "up", "worker 0"} <= rows
    assert (
        path.with_suffix(".png").stat().st_size > 10_000 and "zerolite_offload" in path.with_suffix(".md").read_text()
    )
