"""The commands on the command line: help, exit statuses, one-line mistakes, pipes, and no torch to read files."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from models import build
from paths import ROOT

from zerolite import cli

NAMES = ("doctor", "inspect", "consolidate", "migrate")
# Runs each command in one fresh interpreter, and says which heavy libraries it has imported.
PROBE = """
import json, sys
from zerolite import cli
for arguments in json.loads(sys.argv[1]):
    try:
        status = cli.main(arguments)
    except SystemExit as end:
        status = end.code
    heavy = [name for name in ("torch", "transformers") if name in sys.modules]
    print(json.dumps([arguments[0], status, heavy]), file=sys.stderr)
"""


@pytest.mark.parametrize("name", NAMES)
def test_help_has_examples_and_exit_statuses(name, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and f"  zerolite {name}" in text and "--json" in text
    assert "exit status: 0" in text and ", 1 " in text and "2 " in text
    assert all(len(line) <= 120 for line in text.splitlines())


@pytest.mark.parametrize("name", NAMES)
def test_a_mistake_is_one_line_that_names_the_command(name, capsys, tmp_path):
    """An unknown option, a missing file and a folder for a file: status 2, no traceback."""
    for arguments in (
        ["--nonsense"],
        [str(tmp_path / "nowhere"), str(tmp_path / "out")][: 1 + (name == "consolidate")],
    ):
        assert cli.main([name, *arguments]) == 2
        out, err = capsys.readouterr()
        assert not out and err.startswith(f"zerolite {name}: error: ") and err.count("\n") == 1, err


def test_reading_commands_import_no_torch(tmp_path):
    """It is what lets them answer at once; so do `zerolite --help` and `doctor` without measuring."""
    build("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    calls = [["--help"], ["migrate", str(tmp_path / "ds.json")], ["doctor", "--no_measure"], ["consolidate", "--help"]]
    calls += [["inspect", str(tmp_path / "model")], ["consolidate", str(tmp_path / "model"), str(tmp_path / "out")]]
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(calls)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    rows = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("[")]
    assert [(name, status) for name, status, _ in rows] == [
        ("--help", 0), ("migrate", 0), ("doctor", 0), ("consolidate", 0), ("inspect", 0), ("consolidate", 2),
    ]  # fmt: skip
    assert not [row for row in rows if row[2]]


def test_wide_characters_and_a_pipe_that_closes(tmp_path):
    """A reader that goes away after a line, and a terminal that is plain ASCII, end in no traceback."""
    path = tmp_path / "配置.json"
    path.write_text(
        json.dumps({"zero_optimization": {"stage": 1}, "名\u202e": "值\x1b[31m\u202e"}, ensure_ascii=False), "utf-8"
    )
    command = f"'{sys.executable}' -m zerolite migrate '{path}'"
    for pipe, environment in (
        ("| head -1", {}),
        ("| cat", {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}),
        ("| cat", {"PYTHONUTF8": "1"}),
    ):
        done = subprocess.run(
            ["bash", "-c", f"{command} {pipe}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={"PATH": "/usr/bin:/bin", **environment},
        )
        assert done.returncode == 0 and done.stdout and not done.stderr, done.stderr
        assert "\x1b" not in done.stdout and "\u202e" not in done.stdout
