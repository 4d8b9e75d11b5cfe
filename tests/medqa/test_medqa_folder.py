"""Does an output folder belong to one run, and does a run that is refused leave it as it was?"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from medqa_runs import to_flags

import train_medqa
import zerolite
from zerolite.medqa import claim, ending, resume
from zerolite.medqa.arguments import CORPUS, OPTIONS, parse
from zerolite.medqa.claim import LOCK


def arguments(base: Path, output: Path, **options) -> list[str]:
    named = {"model_name_or_path": base, "tokenizer_name_or_path": CORPUS / "tokenizer", "output_dir": output}
    sizes = {"cutoff_len": 64, "max_samples": 4, "max_steps": 2, "save_steps": 9, "per_device_train_batch_size": 8}
    return to_flags({**named, **sizes, **options})


def main(monkeypatch, argv: list[str]) -> int:
    monkeypatch.setattr(sys, "argv", ["train_medqa.py", *argv])
    return train_medqa.main()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_result_is_not_replaced_and_one_of_another_kind_is_put_aside(base, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert main(monkeypatch, arguments(base, out)) == 0
    before = contents(out)
    assert "model/model.safetensors" in before and LOCK not in before
    assert main(monkeypatch, arguments(base, out, seed=3)) == 2
    said = capsys.readouterr().err
    assert f"{out}: holds model of an earlier run" in said and f"mv {out} {out}-1" in said
    claim.release(out)
    assert contents(out) == before
    lora = {"finetuning_type": "lora", "max_steps": 1}
    assert main(monkeypatch, arguments(out / "model", out, **lora)) == 2  # its base would move
    assert main(monkeypatch, arguments(base, out, **lora)) == 0
    assert "result of an earlier run of another kind is now in" in capsys.readouterr().out
    after = contents(out)
    assert {name: after[f"earlier-1/{name}"] for name in before} == before
    assert "adapter/adapter_model.safetensors" in after and "model/model.safetensors" not in after


def test_two_runs_do_not_work_in_one_folder(tmp_path):
    """The lock is the kernel's: a file that a killed run left is none."""
    out = tmp_path / "out"
    (out).mkdir()
    (out / LOCK).write_text("process 1 on nowhere\n")
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'r+'); fcntl.flock(file, fcntl.LOCK_EX)\n"
        "file.truncate(); file.write('process 77 on elsewhere'); file.flush(); print('locked', flush=True); input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-S", "-c", code, str(out / LOCK)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    options = parse(["--output_dir", str(out)])
    with other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match=r"out: another run works there \(process 77 on elsewhere\)"):
            claim.claim_output(options)
        other.stdin.close()
    assert claim.claim_output(options) is None
    assert (out / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    claim.release(out)
    assert list(out.iterdir()) == []


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def fails(*arguments):
        raise OSError(claim.NO_LOCKS[0], "no locks here")

    monkeypatch.setattr(claim.fcntl, "flock", fails)
    assert "cannot be locked (no locks here)" in claim.claim_output(parse(["--output_dir", str(tmp_path)]))


@pytest.mark.parametrize(
    ("in_the_way", "message"),
    [
        ("model/gguf/weights.gguf", r"model: holds folders \(gguf\), which writing the result would remove"),
        ("adapter", "adapter: is a file, where the result is to be a folder"),
        ("report.md/x", r"report\.md: cannot be written, and the run is going to"),
        ("checkpoint-7", "checkpoint-7: cannot be written"),
    ],
)
def test_what_the_end_could_not_write_is_found_first(tmp_path, in_the_way, message):
    path = tmp_path / in_the_way
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "manifest.json").touch()
    with pytest.raises(ValueError, match=message):
        claim.claim_output(parse(["--output_dir", str(tmp_path), "--resume", str(tmp_path)]))


def test_checkpoints_of_two_runs_are_not_mixed(tmp_path):
    for name in ("a/checkpoint-2", "a/checkpoint-4", "b/checkpoint-3"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "manifest.json").touch()
    a, b = tmp_path / "a", tmp_path / "b"
    for resumed, output, message in [
        (a, b, "b: holds checkpoint-3 of an earlier run"),
        (a / "checkpoint-2", a, "a also holds checkpoint-4, from after it"),
    ]:
        with pytest.raises(ValueError, match=message):
            claim.claim_output(parse(["--resume", str(resumed), "--output_dir", str(output)]))
    for resumed, output in [(a, a), (a / "checkpoint-4", a), (a / "checkpoint-2", tmp_path / "new")]:
        claim.claim_output(parse(["--resume", str(resumed), "--output_dir", str(output)]))


def test_a_result_that_cannot_be_written_leaves_the_training_and_the_command_that_writes_it(
    base, tmp_path, monkeypatch, capsys
):
    whole = zerolite.export

    def fails(model, folder):
        raise zerolite.ZeroliteError("exporting failed: No space left on device")

    monkeypatch.setattr(zerolite, "export", fails)
    assert main(monkeypatch, arguments(base, tmp_path)) == 1
    said = capsys.readouterr().err
    assert "No space left on device; the training is kept in" in said and f"--resume {tmp_path}" in said
    assert [path.name for path in resume.checkpoints(tmp_path)] == ["checkpoint-2"] and "Traceback" not in said
    monkeypatch.setattr(zerolite, "export", whole)
    assert main(monkeypatch, ["--resume", str(tmp_path)]) == 0
    assert (tmp_path / "model/model.safetensors").is_file() and (tmp_path / OPTIONS).is_file()


def test_where_no_checkpoint_can_be_written_either_the_newest_is_named(tmp_path):
    class Alone:
        def sum(self, value):
            return [value]

    def fails():
        raise OSError(28, "No space left on device")

    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "manifest.json").touch()
    with pytest.raises(ending.NotWritten, match=r"nor can a checkpoint: .*newest checkpoint is .*checkpoint-3"):
        ending.result_or_checkpoint(fails, fails, tmp_path, 4, Alone())
    with pytest.raises(ending.NotWritten, match=r"kept in .*checkpoint-3"):  # nothing is written twice
        ending.result_or_checkpoint(fails, fails, tmp_path, 3, Alone())
