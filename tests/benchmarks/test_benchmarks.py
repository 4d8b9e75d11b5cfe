"""Benchmarks run from end to end on a tiny model; what they write is complete, and its losses agree."""

import importlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import programs
import psutil
import pytest
from limits import load
from paths import ROOT
from transformers import LlamaConfig, LlamaForCausalLM


def run(script: str, arguments: str, output: Path) -> str:
    """Run a benchmark on two ranks of the CPU; what it prints."""
    command = [*arguments.split(), "--output", str(output)]
    return programs.run(ROOT / "benchmarks" / script, command, {"CUDA_VISIBLE_DEVICES": ""})


def test_ranks_of_the_harness_are_fresh_interpreters(tmp_path):
    """The other tests fork them."""
    script = tmp_path / "asking.py"
    script.write_text(
        "import os, sys\n"
        "import harness\n"
        "def ask(question):\n"
        "    return [question, os.environ['RANK'], os.environ['OMP_NUM_THREADS'], 'transformers' in sys.modules]\n"
        "if __name__ == '__main__':\n"
        "    print(harness.launch(ask, {'question': 'who'}, 2, {'OMP_NUM_THREADS': '3'}))\n"
    )
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT / "benchmarks")}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=280 * load()
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[['who', '0', '3', False], ['who', '1', '3', False]]"


def test_a_hung_rank_is_ended_with_what_it_has_started(monkeypatch):
    """A compiler that goes on would hold the lock that later ranks wait for."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    harness, started = importlib.import_module("harness"), []

    def start_rank(script, function, folder, environment, log):
        started.append(subprocess.Popen(["sh", "-c", "sleep 100 & wait"]))
        while not psutil.Process(started[0].pid).children():
            time.sleep(0.01)
        started.extend(psutil.Process(started[0].pid).children())
        return started[0]

    monkeypatch.setattr(harness, "start_rank", start_rank)
    with pytest.raises(harness.RankError, match="did not end in time"):
        harness.launch(load, {}, 1, timeout=0.2)
    child = started[1]
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_zero_step_writes_complete_results(tmp_path):
    """Two ranks, DDP and zerolite's stage 2: every field is there, the losses are those of one process."""
    run("steps/zero_step.py", "--size tiny --ranks 2 --steps 2 --repeats 1 --modes zerolite2", tmp_path)
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
    printed = run("offload/offload.py", arguments, tmp_path)
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


def test_lora_writes_complete_results(tmp_path):
    """Every contender's time, error against fp64 and bytes; ours keeps less than PEFT, at dropout 0.05 far less."""
    pytest.importorskip("peft")
    run("adapters/lora.py", "--kinds qkv --models tiny --tokens 48 --ranks 8 --rounds 1 --sample-ms 1", tmp_path)
    report = json.loads((tmp_path / "lora_fp32_cpu.json").read_text())
    (case,) = report["cases"]
    rows = case["rows"]
    assert {"frozen", "PEFT, dropout 0", "PEFT, dropout 0.05", "addmm formula, dropout 0"} < rows.keys()
    for name, row in rows.items():
        assert all(milliseconds > 0 for times in row["times"] for milliseconds in times.values())
        assert all(error < 1e-5 for error in row.get("errors", {}).values()), name
    assert rows["frozen"]["saved_bytes"] == 0
    assert rows["zerolite, dropout 0.05"]["saved_bytes"] < 0.3 * rows["PEFT, dropout 0.05"]["saved_bytes"]
    assert (tmp_path / "lora_fp32_cpu.png").stat().st_size > 10_000
    assert "times as fast as PEFT, dropout 0.05" in (tmp_path / "lora_fp32_cpu.md").read_text()


def test_finetune_methods_writes_complete_results(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=4096, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer = ROOT / "zerolite" / "medqa" / "corpus" / "tokenizer"
    small = f"--tokenizer_name_or_path {tokenizer} --max_samples 8 --max_steps 2 --cutoff_len 64 --logging_steps 1"
    arguments = f"--base {tmp_path / 'base'} --methods full prefix"
    command = f"{arguments} --output {tmp_path} -- {small}"
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "adapters" / "finetune_methods.py", *command.split()],
        capture_output=True, text=True, timeout=280 * load(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    full, prefix = json.loads((tmp_path / "finetune_methods_cpu.json").read_text())["rows"]
    assert full["memory"]["gradients"] > prefix["memory"]["gradients"] > 0
    assert all(math.isfinite(row[key]) for row in (full, prefix) for key in ("first", "last", "tokens_per_second"))
    assert "| prefix |" in (tmp_path / "finetune_methods_cpu.md").read_text()
