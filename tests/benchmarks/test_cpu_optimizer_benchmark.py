"""The host kernels' benchmark runs from end to end, and what it writes is complete."""

import json
import shutil
import subprocess
import sys

import pytest
from limits import load
from paths import ROOT
from zerolite_kernels import cpu

SCRIPT = ROOT / "benchmarks" / "host" / "cpu_optimizer.py"


@pytest.mark.skipif(cpu.path() is None or shutil.which("cc") is None, reason="needs the host kernels and a C compiler")
def test_cpu_optimizer_writes_complete_results(tmp_path):
    """One small group on one process: every contender has a time, zerolite's a share of the ceiling."""
    arguments = "--sizes 1 --rounds 1 --sample 1 --groups lion --layouts 1x1 --output".split()
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments, tmp_path], capture_output=True, text=True, timeout=120 * load()
    )
    assert done.returncode == 0, done.stderr

    report = json.loads((tmp_path / "cpu_optimizer.json").read_text())
    assert {"cpu", "cores", "versions", "commit", "date", "command", "path"} <= report["facts"].keys()
    [row] = report["rows"]
    assert {"plain torch", "zerolite, fp32 master", "zerolite, int8 states"} <= row["times"].keys()
    for name, times in row["times"].items():
        assert len(times["step"]) == 1 and times["step"][0] > 0
        assert len(times["ceiling"]) == name.startswith("zerolite")
    text = (tmp_path / "cpu_optimizer.md").read_text()
    assert "zerolite, int8 states" in text and str(tmp_path) not in text
