"""Benchmarks run from end to end on a tiny model; what they write is complete, and its losses agree."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_zero_step_writes_complete_results(tmp_path):
    """Two ranks, DDP and zerolite's stage 2: every field is there, the losses are those of one process."""
    script = ROOT / "benchmarks" / "zero_step.py"
    arguments = "--size tiny --ranks 2 --steps 2 --repeats 1 --modes zerolite2 --output".split()
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # two ranks, also where there is one GPU
    command = [sys.executable, script, *arguments, tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr

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
