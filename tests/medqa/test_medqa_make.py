"""What `make train` and `make train-tiny` start: commands that parse, whatever the package index has."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest
from paths import ROOT

from zerolite.medqa import base
from zerolite.medqa.arguments import Options, parse

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

PYTHON = 'echo "python $*" >> started; exit ${BASE_STATUS:-0}'
CALL = r"(?:^ {4}|`)make ([a-z-]+)"  # a target in a page's code
TORCHRUN = 'echo "torchrun $*" >> started; mkdir -p outputs/medqa; echo "$*" > outputs/medqa/report.md'


@pytest.fixture
def make(tmp_path):
    """Run a target in a folder with the Makefile, an environment of two scripts that note how they were called."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, script in (("python", PYTHON), ("torchrun", TORCHRUN)):
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    (tmp_path / ".venv" / "installed").touch()

    def run(target: str, base_status: int = 0) -> tuple[int, list[list[str]], str]:
        """(exit status, command lines that were started, what was printed)"""
        (tmp_path / "started").unlink(missing_ok=True)
        environment = {**os.environ, "BASE_STATUS": str(base_status), "SHELL": "/bin/sh"}
        environment.pop("MAKEFLAGS", None)
        done = subprocess.run(
            ["make", target], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        started = tmp_path / "started"
        lines = started.read_text().splitlines() if started.exists() else []
        return done.returncode, [line.split() for line in lines], done.stdout

    return run


def options_of(command: list[str]) -> Options:
    launcher = ["torchrun", "--standalone", "--nproc-per-node", "2", "train_medqa.py"]
    assert command[: len(launcher)] == launcher
    return parse(command[len(launcher) :])


def test_the_real_llama_is_fetched_and_fine_tuned_on_two_ranks_at_stage_2(make):
    status, (fetch, train), _ = make("train")
    assert status == 0 and fetch[:3] == ["python", "-m", "zerolite.medqa.base"]
    options = options_of(train)
    assert [options.model_name_or_path] == fetch[3:] == [str(base.FOLDER)]
    assert options.stage == 2 and options.output_dir == "outputs/medqa" and options.validation_file is None
    assert options.train_file is None, "the shipped rows of both languages"
    assert not options.is_adapter or options.export_merged, "outputs/medqa/model is what pages and messages name"


def test_without_the_package_it_says_so_and_trains_what_train_tiny_trains(make):
    status, (_, train), told = make("train", base.UNAVAILABLE)
    assert status == 0 and "the small LLaMA is trained from scratch" in told
    assert options_of(train).model_name_or_path is None
    _, (tiny,), _ = make("train-tiny")
    assert tiny == train


def test_any_other_failure_of_fetching_ends_it(make):
    status, (fetch,), told = make("train", 2)
    assert status != 0 and "Error 2" in told


def test_an_earlier_result_is_kept_under_another_name(make, tmp_path):
    make("train-tiny")
    first = (tmp_path / "outputs" / "medqa" / "report.md").read_text()
    status, _, told = make("train")
    assert status == 0
    kept = re.search(r"outputs/medqa of an earlier run is now (\S+)", told)[1]
    assert (tmp_path / kept / "report.md").read_text() == first
    assert (tmp_path / "outputs" / "medqa" / "report.md").read_text() != first


def test_pages_name_targets_that_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    pages = [ROOT / "README.md", *ROOT.glob("zerolite/**/README.md"), *ROOT.glob(".github/*.md")]
    named = {name for page in pages for name in re.findall(CALL, page.read_text("utf-8"), re.MULTILINE)}
    assert {"train", "train-tiny", "test"} <= named <= set(targets)
