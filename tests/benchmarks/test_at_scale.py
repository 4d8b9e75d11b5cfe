"""The benchmark of what no machine here has runs from end to end, and its rows are the plan's."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
from paths import ROOT

import zerolite


@pytest.fixture
def at_scale(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("at_scale", ROOT / "benchmarks" / "scale" / "at_scale.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_are_the_plans(at_scale, tmp_path, monkeypatch, capsys):
    """A small form: bytes and what is sent as `zerolite.plan` says, a picture, a table without absolute paths."""
    argv = "at_scale.py --models smollm2-135m --ranks 8 64 --parameters 400 800 --output".split()
    monkeypatch.setattr(sys, "argv", [*argv, str(tmp_path)])
    at_scale.main()
    report = json.loads((tmp_path / "at_scale.json").read_text())
    rows = {(row["stage"], row["shards"], row["replicas"]): row for row in report["sizes"]}
    assert set(rows) == {(stage, ranks, 1) for stage in (1, 2, 3) for ranks in (8, 64)} | {(3, 8, 8)}
    plan = zerolite.plan("smollm2-135m", 3, 64, precision=at_scale.PRECISION, batch=None)
    row = rows[3, 64, 1]
    assert (row["states_bytes"], row["sent_bytes"]) == (plan.states_bytes, plan.traffic.sent_bytes)
    assert row["messages"] == plan.traffic.num_collectives and row["python_calls"] > 0
    small, large = report["growth"]
    assert large["python_calls"] / small["python_calls"] < 1.1 * large["parameters"] / small["parameters"]
    text = (tmp_path / "at_scale.md").read_text()
    assert "8 x 8" in text and str(tmp_path) not in text
    assert (tmp_path / "at_scale.png").read_bytes().startswith(b"\x89PNG")
