"""The memory benchmark: what it counts is what torch and `zerolite.measure` count, and the plan is within 5 % of it.

README's hardware table is the committed one, and the committed one is what the plan says today.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys

import programs
import pytest
import torch
from paths import ROOT
from torch import nn

FOLDER = ROOT / "benchmarks" / "memory"
for folder in (FOLDER, ROOT / "benchmarks"):  # as its scripts see them
    sys.path.append(str(folder))
hardware_table, live_log = (importlib.import_module(name) for name in ("hardware_table", "live_log"))
memory_report, configurations = (importlib.import_module(name) for name in ("memory_report", "configurations"))

TABLE = json.loads((ROOT / "benchmarks" / "results" / "hardware_table.json").read_text())
MODES = "zerolite3 zerolite2-optimizer-lora fsdp2 torchao-offload"


def off(row: dict) -> float:
    return abs(memory_report.off_by(row))


def test_a_small_form_writes_complete_results(tmp_path):
    """Two ranks on the CPU: plan beside measurement, states of the formula, and a row for who could not run."""
    command = f"--model tiny --steps 1 --scale --modes {MODES} --output {tmp_path}"
    programs.run(FOLDER / "memory.py", command.split(), {"CUDA_VISIBLE_DEVICES": ""})
    path = tmp_path / "memory_tiny_bf16_cpu.json"
    report = json.loads(path.read_text())
    rows = {row["mode"]: row for row in report["rows"]}
    assert list(rows) == ["ddp", *MODES.split()]
    for mode in ("zerolite3", "zerolite2-optimizer-lora"):
        row = rows[mode]
        assert off(row) < 0.05 and len(row["by_rank"]) == 2 and row["step_to_ddp"] > 0
        usage = row["usage"]
        counted = usage["parameters_bytes"] + usage["gradients_bytes"] + usage["optimizer_bytes"]
        assert row["plan"]["states"] == counted  # to the byte
        assert row["states"] == pytest.approx(counted, rel=0.01)  # rotary tables, the batches
        assert row["formula"]["device"] == pytest.approx(counted, rel=0.01)
        assert row["plan"]["arena"] == usage["host_bytes"]
    assert rows["fsdp2"]["states"] == pytest.approx(rows["zerolite3"]["states"], rel=0.01)
    buckets = 4 * report["parameters"]
    assert rows["ddp"]["states"] == pytest.approx(rows["ddp"]["formula"]["device"] + buckets, rel=0.01)
    text = path.with_suffix(".md").read_text()
    assert "torchao-offload | did not run: " in text and str(tmp_path) not in text + path.read_text()
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_resuming_runs_what_has_not_run(monkeypatch):
    """Rows of an earlier file stay as they are, those with a reason are tried again, the baseline runs anew."""
    memory, ran = importlib.import_module("memory"), []

    def run(mode, ranks, work, steps, launching):
        ran.append((mode, ranks))
        return {"mode": mode, "ranks": ranks, "step_seconds": 2.0}

    monkeypatch.setattr(memory, "run", run)
    options = argparse.Namespace(
        model="tiny", precision="bf16", micro_batch=1, sequence=8, checkpointing=False, scale=[1, 2], ranks=2, steps=1,
        group=8, timeout=1, modes=["ddp", "zerolite3", "fsdp2"],
    )  # fmt: skip
    earlier = {
        "facts": {"date": "before"},
        "earlier_facts": [],
        "rows": [{"mode": "ddp", "ranks": 2}, {"mode": "zerolite3", "ranks": 2}, {"mode": "fsdp2", "reason": "hung"}],
        "over_ranks": [{"mode": "zerolite3", "ranks": 1}],
    }
    *_, report = memory.collect(options, earlier)
    assert ran == [("ddp", 2), ("fsdp2", 2), ("ddp", 2), ("ddp", 1), ("fsdp2", 1)]
    assert [row["mode"] for row in report["rows"]] == ["ddp", "zerolite3", "fsdp2"]
    assert report["rows"][2]["step_to_ddp"] == 1.0 and report["earlier_facts"] == [{"date": "before"}]


class Gathered(nn.Module):
    """A weight whose storage is empty outside of `gather` and `free`."""

    def __init__(self):
        super().__init__()
        self.weight = torch.ones(1000)
        self.free()

    def gather(self) -> None:
        self.weight.untyped_storage().resize_(4000)

    def free(self) -> None:
        self.weight.untyped_storage().resize_(0)


def test_the_log_counts_plain_torch_to_the_byte():
    """A layer without bias under AdamW, and a gathered weight beside it: every kind is known by hand."""
    with live_log.LiveLog("cpu") as log:
        layer, gathered = nn.Linear(100, 100, bias=False), Gathered()
        optimizer = torch.optim.AdamW(layer.parameters(), foreach=False, fused=True)
        for _ in range(2):
            log.begin()
            log.phase = "forward"
            gathered.gather()
            hidden = layer(torch.ones(10, 100))
            loss = hidden.square().sum()
            gathered.free()
            log.end_phase()
            log.phase = "backward"
            loss.backward()
            del loss, hidden
            log.end_phase()
            log.phase = "step"
            optimizer.step()
            optimizer.zero_grad()
        weight = 100 * 100 * 4
        assert log.states_bytes() == 4 * weight + 4  # with the gradient, and AdamW's step count
        peak = log.peak()
        assert peak["states"] == 3 * weight + 4 and peak["gradients"] == weight
        log.phase = "forward"
        log.begin()
        gathered.gather()
        held = [torch.empty(50_000) for _ in range(3)]
        gathered.free()
        del held
        assert log.peak() == {"states": 3 * weight + 4, "gradients": 0, "activations": 600_000, "in flight": 4000}
    assert torch.UntypedStorage.resize_ is live_log.torch.UntypedStorage.resize_


def test_formulas_are_those_of_zero():
    """16 bytes a parameter, divided by stage; offload moves, LoRA leaves what is frozen."""
    of = configurations.CONFIGURATIONS
    expected = {"zerolite0": 16, "zerolite1": 4 + 3, "zerolite2": 2 + 3.5, "zerolite3": 4, "fsdp2": 4, "ddp": 16}
    for mode, width in expected.items():
        assert of[mode].formula("bf16", 4, 0, 1000) == {"device": width * 1000, "host": 0}, mode
    assert of["zerolite2-optimizer"].formula("bf16", 4, 0, 1000) == {"device": 2000, "host": 3500}
    assert of["zerolite3-parameters-lora"].formula("bf16", 4, 1000, 40) == {"device": 0, "host": 660}
    assert of["deepspeed1"].formula("fp32", 4, 0, 1000) == {"device": 10_000, "host": 0}


def test_a_reason_is_one_line_without_paths():
    text = (
        "rank 0 ended with exit code 1:\n  File x\n[rank0]: RuntimeError: cannot open /home/someone/a/file.so: no\nmore"
    )
    assert memory_report.reason_of(text) == "RuntimeError: cannot open file.so: no"
    assert memory_report.reason_of("the ranks did not end in time") == "the ranks did not end in time"


# --- the hardware table ---------------------------------------------------------------------------------------------


def test_the_committed_table_is_what_the_plan_says():
    """Rows of its smallest model, full training at two cards: who changes the plan writes the table anew."""
    for method in hardware_table.METHODS:
        if 2 in method.cards and "LoRA" not in method.name:
            row = next(row for row in TABLE["rows"] if (row["method"], row["cards"]) == (method.name, 2))
            model = hardware_table.MEASURED
            assert hardware_table.planned(method, 2, model) == row["models"][model], method.name


def test_measured_rows_are_marked_and_near():
    found = [row["measured"] for row in TABLE["rows"] if row["measured"]]
    assert found and all(each["plan_bytes"] == pytest.approx(each["peak_bytes"], rel=0.05) for each in found)
    text = (ROOT / "benchmarks" / "results" / "hardware_table.md").read_text()
    assert text.count("✓ ") == len(found)


def cells_of(name: str, pattern: str) -> list[tuple[str, ...]]:
    """Of each row of a page's hardware table, what the pattern finds and the cells after it."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(rf"^\| {pattern} \| ((?:\d+\.\d[ +\d]*✓?(?: \| )?){{4}}) \|$", text, re.MULTILINE)


def test_readme_shows_the_committed_table():
    """Each cell is the GiB of the committed file, with the mark of a row that was measured; in both languages."""
    rows = {(row["method"], row["cards"]): row for row in TABLE["rows"]}
    shown = cells_of("README.md", r"(.+), (\d) cards?")
    assert len(shown) >= 6
    for method, cards, cells in shown:
        row = rows[method, int(cards)]
        figures = [hardware_table.cell(row["models"][model], "offloaded" in method) for model in TABLE["models"]]
        figures[0] += " ✓" if row["measured"] else ""
        assert cells == " | ".join(figures), method
    assert cells_of("README.zh.md", "(?:.+)") == [cells for *_, cells in shown]
