"""What a run tells of itself: at its start, in each line, in its picture and in its report."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from matplotlib.figure import Figure
from medqa_runs import to_flags, write_talker

import train_medqa
import zerolite
from zerolite.medqa import answers, arguments, curves, machine, progress
from zerolite.medqa.arguments import CORPUS, Options, parse

STEPS = 6


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> tuple[Path, str]:
    """(the output folder, what was printed) of a run without a terminal."""
    folder = tmp_path_factory.mktemp("run")
    base = write_talker(folder / "base")
    sizes = {"cutoff_len": 64, "max_samples": 6, "max_steps": STEPS, "logging_steps": 1, "eval_steps": 2}
    argv = to_flags({"model_name_or_path": base, "output_dir": folder / "out", "learning_rate": 1e-3, **sizes})
    for name in ("train", "validation"):
        argv += [f"--{name}_file", *map(str, sorted(CORPUS.glob(f"{name}.*.jsonl")))]
    command = ["/x/train_medqa.py", *argv, "--validation_file", "https://me:hunter2@host/v?token=hunter3&x=1"]
    out, before = io.StringIO(), sys.argv
    sys.argv = command
    try:
        with contextlib.redirect_stdout(out):
            assert train_medqa.train(train_medqa.prepare(parse(argv))) == 0
    finally:
        sys.argv = before
    return folder / "out", out.getvalue()


def test_the_start_tells_the_options_that_are_not_the_defaults(told):
    folder, out = told
    head = out[: out.index("train: ")]
    assert "\nmax_steps: 6\n" in head and "\nlearning_rate: 0.001\n" in head and "model_name_or_path: " in head
    assert not re.search("^(stage|precision|seed|optim|num_train_epochs|lora_rank):", head, re.MULTILINE)
    assert parse(["--config", str(folder / "options.yaml")]).precision == "fp32"  # the file has all
    lora = Options(model_name_or_path="m", finetuning_type="lora", seed=7).resolved("cuda")
    assert lora.told("cuda").splitlines()[1:3] == ["model_name_or_path: m", "finetuning_type: lora"]
    assert set(lora.told("cuda").splitlines()[3:]) == {"seed: 7", "stage: null"}


def test_each_line_after_the_first_tells_the_time_left(told):
    lines = [line for line in told[1].splitlines() if line.startswith("step ") and f"/{STEPS}  " in line]
    assert len(lines) == STEPS and "left" not in lines[0]
    assert all(re.search(r"  left (\d+ h )?(\d+ min)?( ?\d+ s)?$", line) for line in lines[1:])
    assert lines[-1].endswith("left 0 s")


def test_the_time_left_is_that_of_the_steps_so_far(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    shown = progress.Progress(tmp_path, rank=0, first_step=100, num_steps=300)
    now[0] = 50.0  # the first step compiles
    shown.advance(101)
    assert shown.left(101) is None
    now[0] = 60.0
    shown.advance(106)
    assert shown.left(106) == "6 min 28 s"  # 194 steps of 2 s
    assert [machine.duration(seconds) for seconds in (0.4, 59.9, 60, 3600, 93784)] == [
        "0 s",
        "59 s",
        "1 min 0 s",
        "1 h 0 min",
        "26 h 3 min",
    ]


def test_the_report_tells_what_ran_where_without_secrets(told):
    folder, out = told
    report = (folder / "report.md").read_text(encoding="utf-8")
    assert report.startswith("# Medical questions and answers: full training of base, stage 2\n") and report in out
    rows = dict(re.findall(r"^\| (command|code|machine|started|took) \| (.*) \|$", report, re.MULTILINE))
    assert rows["command"].startswith("`python train_medqa.py --model_name_or_path ")
    assert "hunter" not in report and "***@host" in rows["command"] and "x=1" in rows["command"]
    root = Path(zerolite.__file__).parents[1]
    if (root / ".git").exists():
        head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True).stdout
        assert re.search(r"commit ([0-9a-f]+)", rows["code"])[1] == head[:12]
    assert f"zerolite {zerolite.__version__}" in rows["code"] and "torch 2." in rows["code"]
    assert f"{len(os.sched_getaffinity(0))} cores" in rows["machine"] and rows["took"].endswith(
        f"s for steps 0 to {STEPS}, validations and the result"
    )
    last = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][-1]
    assert f"| {last['validation_loss_en']:.4f} | {last['validation_loss_zh']:.4f} |" in report
    assert "All in MiB" in report and not re.search(r"\d{6}", report.split("## Memory")[1].split("## Answers")[0])
    assert [machine.mib(n * 2**20) for n in (0, 0.25, 9.5, 10, 12345.678)] == [
        "0.0",
        "0.250",
        "9.500",
        "10.0",
        "12,345.7",
    ]


def test_without_a_checkout_the_version_is_the_code(monkeypatch, tmp_path):
    monkeypatch.setattr(zerolite, "__file__", str(tmp_path / "zerolite" / "__init__.py"))
    assert machine.code_version() == f"zerolite {zerolite.__version__}"
    (tmp_path / ".git").mkdir()  # one that git cannot read
    assert machine.code_version() == f"zerolite {zerolite.__version__}"


def test_each_evaluation_leaves_an_answer_in_each_language(told):
    folder, _ = told
    assert [one.step for one in answers.read(folder)] == [0] * 4 + [2] * 2 + [4] * 2 + [STEPS] * 4
    report = (folder / "report.md").read_text(encoding="utf-8")
    first = {one.question: one.generated for one in answers.read(folder) if one.step == 0}
    assert all(f"**Before training** {text}" in report for text in first.values())
    assert report.count("**Before training**") == report.count("**After training**") == 4


def test_the_picture_has_every_curve_and_skips_what_is_no_number(told, monkeypatch):
    folder, _ = told
    drawn = {}

    def keep(figure, path, **_):
        for axes in figure.axes:
            drawn[axes.get_title(loc="left")] = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}

    monkeypatch.setattr(Figure, "savefig", keep)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 7, "loss": None, "grad_norm": None, "learning_rate": 0.0}) + "\n")
    curves.plot(folder)
    losses = drawn.pop("loss (nats a label token)")
    assert {name: [step for step, _ in points] for name, points in losses.items()} == {
        "training": [1, 2, 3, 4, 5, 6],
        **dict.fromkeys(("validation", "validation en", "validation zh"), [0, 2, 4, 6]),
    }
    assert {title: len(panel) for title, panel in drawn.items()} == {
        "learning rate": 1,
        "gradient norm before clipping": 1,
        "tokens a second, all ranks": 1,
        "memory (MiB)": 2,
    }
    monkeypatch.undo()
    curves.plot(folder)
    width = int.from_bytes((folder / "loss.png").read_bytes()[16:20], "big")
    assert width == round(curves.WIDTH_INCHES * curves.DOTS_PER_INCH)


def test_host_memory_counts_the_process_and_its_workers_once(monkeypatch):
    """Shared pages, of the arena that a rank and its workers map, are not counted for each."""
    memory = machine.HostMemory()
    memory.workers = []  # of other tests
    assert memory.resident_bytes() == pytest.approx(psutil.Process().memory_info().rss, rel=0.05)
    sizes = {0: (1000, 700), 1: (500, 450), 2: (500, 450)}
    named = {number: type("Usage", (), {"rss": rss, "shared": shared}) for number, (rss, shared) in sizes.items()}
    monkeypatch.setattr(machine, "_memory", {**named, 3: None}.__getitem__)
    memory.own, memory.workers = 0, [1, 2, 3]  # 3 has ended
    assert memory.resident_bytes() == 300 + 50 + 50 + 900


def test_names_of_options_that_trackers_get_are_options():
    assert set(train_medqa.trackers.TRACKED) <= arguments.FIELDS.keys()
    texts = {"model_name_or_path", "output_dir", "train_file", "prompt_init_text", "columns", "offload_path", "resume"}
    assert not texts & set(train_medqa.trackers.TRACKED)
