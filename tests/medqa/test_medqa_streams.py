"""Does nothing that happens to the terminal end a run: its encoding, its reader, its connection?"""

from __future__ import annotations

import io
import os
import signal
import sys
from pathlib import Path

import pytest
from medqa_runs import to_flags

import train_medqa
from zerolite.medqa import base as real_base
from zerolite.medqa import prepare, resume
from zerolite.medqa.arguments import CORPUS
from zerolite.medqa.streams import lasting


def run(monkeypatch, base: Path, output: Path) -> int:
    options = {"model_name_or_path": base, "tokenizer_name_or_path": CORPUS / "tokenizer", "output_dir": output}
    sizes = {"cutoff_len": 64, "max_samples": 4, "max_steps": 3, "per_device_train_batch_size": 8, "logging_steps": 1}
    monkeypatch.setattr(sys, "argv", ["train_medqa.py", *to_flags({**options, **sizes})])
    return train_medqa.main()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_characters_that_stdout_has_not_are_escaped(base, tmp_path, monkeypatch, encoding):
    """The report has a Φ, and rows are Chinese."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding, write_through=True))
    assert run(monkeypatch, base, tmp_path) == 0
    text = written.getvalue().decode(encoding)
    assert "\\u03a6" in text and f"result: {tmp_path / 'model'}" in text and "Φ" in (tmp_path / "report.md").read_text()


def test_a_run_goes_on_when_its_reader_is_gone(base, tmp_path, monkeypatch):
    """As behind `| head`, a `tee` that was killed, or a terminal whose connection is lost."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", buffering=1) as lost:
        monkeypatch.setattr(sys, "stdout", lost)
        monkeypatch.setattr(sys, "stderr", lost)
        assert run(monkeypatch, base, tmp_path) == 0
    assert (tmp_path / "model/model.safetensors").is_file()


def test_streams_that_cannot_be_reconfigured_are_escaped_and_come_back():
    class Odd(io.StringIO):
        encoding = "ascii"

        def write(self, text):
            text.encode("ascii")
            return super().write(text)

    before, odd = sys.stdout, Odd()
    sys.stdout = odd
    try:
        with lasting():
            print("Φ 感冒")
        assert sys.stdout is odd and odd.getvalue() == "\\u03a6 \\u611f\\u5192\n"
    finally:
        sys.stdout = before


@pytest.mark.parametrize("is_nohup", [False, True])
def test_a_lost_connection_leaves_a_checkpoint_and_nohup_holds(base, tmp_path, monkeypatch, capsys, is_nohup):
    whole, losses = train_medqa.label_loss, []

    def loss(*given):
        losses.append(1)
        if len(losses) == 2:
            os.kill(os.getpid(), signal.SIGHUP)
        return whole(*given)

    monkeypatch.setattr(train_medqa, "label_loss", loss)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if is_nohup else signal.SIG_DFL)
    try:
        status = run(monkeypatch, base, tmp_path)
    finally:
        signal.signal(signal.SIGHUP, before)
    if is_nohup:
        assert status == 0 and len(losses) == 3 and (tmp_path / "model").is_dir()
        return
    assert status == 128 + signal.SIGHUP and [one.name for one in resume.checkpoints(tmp_path)] == ["checkpoint-2"]
    assert f"stopped by SIGHUP: {tmp_path / 'checkpoint-2'} is complete; go on with: " in capsys.readouterr().out


def test_commands_print_on_any_terminal(tmp_path, monkeypatch):
    rows = tmp_path / "感冒.jsonl"
    rows.write_text('{"instruction": "感冒", "output": "休息", "source": "来源"}\n', encoding="utf-8")
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True))
    assert prepare.main([str(rows), "--output", str(tmp_path / "行.jsonl")]) == 0
    (tmp_path / "模型").mkdir()
    assert real_base.main([str(tmp_path / "模型")]) == 2
    assert b"\\u6a21" in sys.stderr.buffer.getvalue()
