"""`make gpu` without a GPU: its parts name scripts and options that exist, and are resumed, limited and shown."""

import importlib
import json
import sys

import pytest
from paths import ROOT

sys.path.append(str(ROOT / "benchmarks"))  # as its scripts see it
gpu = importlib.import_module("gpu")
PARTS, Part = gpu.PARTS, gpu.Part


@pytest.mark.parametrize("name", PARTS)
def test_a_part_names_what_exists(name, tmp_path):
    """Ten minutes at most; a benchmark's script is there, and writes into the folder that it is told."""
    command = PARTS[name].command(tmp_path, is_tiny=False)
    assert PARTS[name].limit <= 600 and "GPUS" not in command
    if PARTS[name].benchmark:
        assert (gpu.ROOT / "benchmarks" / PARTS[name].benchmark).is_file()
        assert command[command.index("--output") + 1] == str(tmp_path)
        script = (gpu.ROOT / "benchmarks" / PARTS[name].benchmark).read_text()
        own = command[2 : command.index("--")] if "--" in command else command[2:]
        for option in own:
            assert not option.startswith("--") or f'"{option}"' in script, option


@pytest.fixture
def parts(monkeypatch, tmp_path):
    """Parts of one line each, in place of the real ones."""
    scripts = {
        "good": "open(folder / 'steps.md', 'w').write('# steps'); (folder / 'steps.json').write_text('{}')",
        "bad": "print('what went wrong'); sys.exit(3)",
        "slow": "__import__('time').sleep(60)",
    }
    for name, line in scripts.items():
        head = "import sys; from pathlib import Path; folder = Path(sys.argv[sys.argv.index('--output') + 1])\n"
        (tmp_path / f"{name}.py").write_text(head + line)
    found = {name: Part("", benchmark=str(tmp_path / f"{name}.py"), limit=20) for name in scripts}
    found["slow"] = Part("", benchmark=str(tmp_path / "slow.py"), limit=1)
    monkeypatch.setattr(gpu, "PARTS", found)


def test_a_part_leaves_one_file_and_is_resumed(parts, tmp_path, capsys):
    """What succeeded is not run again; what failed is, and what takes too long is ended."""
    output = tmp_path / "out"
    assert gpu.run_parts(["good", "bad", "slow"], output, 600, is_tiny=True) == ["bad", "slow"]
    good, bad, slow = (json.loads((output / f"{name}.json").read_text()) for name in ("good", "bad", "slow"))
    assert good["reports"] == {"steps.md": "# steps", "steps.json": "{}"} and good["machine"]["date"]
    assert (bad["code"], bad["tail"].strip()) == (3, "what went wrong") and slow["code"] == 124
    assert str(tmp_path / "out") not in good["command"]
    capsys.readouterr()
    assert gpu.run_parts(["good", "bad"], output, 600, is_tiny=True) == ["bad"]
    assert "good: done before" in capsys.readouterr().out


def test_no_part_starts_that_may_not_end_in_time(parts, tmp_path):
    assert gpu.run_parts(["good", "slow"], tmp_path / "out", 10, is_tiny=True) == ["good", "slow"]
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["slow.json"]


def test_parts_become_reports_and_a_table(parts, tmp_path):
    output, results = tmp_path / "out", tmp_path / "results"
    results.mkdir()
    gpu.run_parts(["good", "bad"], output, 600, is_tiny=True)
    text = gpu.show(output, results)
    assert (results / "steps.md").read_text() == "# steps" and (results / "gpu.md").read_text() == text
    assert "| good | ok |" in text and "`steps.md`" in text
    assert "| bad | exit code 3 |" in text and "what went wrong" in text


def test_without_a_gpu_it_says_what_it_can_do(monkeypatch, capsys):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(["steps"])
    assert "--tiny runs a small form" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu.main(["stepz"])
    assert "no such part: stepz" in capsys.readouterr().err
