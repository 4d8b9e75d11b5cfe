"""What a run does with broken files and gradients that are never finite: it goes on, or ends with the reason."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from medqa_runs import tiny_llama, to_flags
from models import assert_same_bits

import train_medqa
import zerolite
from zerolite.medqa import data, model, resume
from zerolite.medqa.arguments import CORPUS, parse
from zerolite.medqa.divergence import MAX_SKIPPED, MAX_SKIPPED_FP16, Diverged
from zerolite.medqa.progress import METRICS, read_metrics
from zerolite.runtime import atomic_dir


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama().save_pretrained(folder)
    return folder


def arguments(folder: Path, output: Path, **options) -> list[str]:
    named = {"model_name_or_path": folder, "tokenizer_name_or_path": CORPUS / "tokenizer", "output_dir": output}
    sizes = {"cutoff_len": 64, "max_samples": 8, "max_steps": 3, "logging_steps": 1, "save_steps": 1}
    return to_flags({**named, **sizes, **options})


def trained(argv: list[str]) -> dict[str, torch.Tensor]:
    run = train_medqa.prepare(parse(argv))
    assert train_medqa.train(run) == 0
    with zerolite.full_params(run.model):
        return {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}


@pytest.mark.parametrize("tail", [b'{"step": 3, "lo', b"\0" * 60, b"[3]\n7\n\n"], ids=["torn", "nul", "other"])
def test_a_run_goes_on_from_the_newest_whole_checkpoint_and_past_torn_metrics(tiny_folder, tmp_path, capsys, tail):
    expected = trained(arguments(tiny_folder, tmp_path, eval_steps=1))
    newest = resume.checkpoints(tmp_path)[-1]
    (saved,) = newest.glob("*.safetensors")
    saved.write_bytes(saved.read_bytes()[:-1] + b"\x7f")
    with (tmp_path / METRICS).open("ab") as file:
        file.write(tail)
    with pytest.warns(UserWarning, match=r"metrics\.jsonl: no record in line"):
        again = trained(arguments(tiny_folder, tmp_path, eval_steps=1, resume=tmp_path))
    assert_same_bits(expected, again)
    out = capsys.readouterr().out
    assert f"{newest.name} is not usable, trying an older one: " in out and "checkpoint-2 at step 2" in out
    told = [(record["step"], "validation_loss" in record) for record in read_metrics(tmp_path / METRICS)]
    assert told == [
        (0, True),
        *((step, is_validation) for step in (1, 2, 3) for is_validation in (False, True)),
    ]  # each once


def test_a_named_checkpoint_is_taken_or_refused_not_replaced(tiny_folder, tmp_path):
    trained(arguments(tiny_folder, tmp_path, max_steps=2))
    damaged = tmp_path / "checkpoint-2"
    (damaged / "manifest.json").write_text("{")
    with pytest.raises(zerolite.CheckpointError, match="checkpoint-2"):
        trained(arguments(tiny_folder, tmp_path, resume=damaged))
    for folder in resume.checkpoints(tmp_path):
        (folder / "manifest.json").write_text("{")
    with pytest.raises(zerolite.CheckpointError, match="checkpoint-2"):  # the newest is what the user would repair
        trained(arguments(tiny_folder, tmp_path, resume=tmp_path))


def test_a_resumed_run_removes_what_a_killed_save_left_and_validates_its_end_once(tiny_folder, tmp_path):
    """A save at a signal is at a step that the resumed run may never save."""
    trained(arguments(tiny_folder, tmp_path, max_steps=2))
    left, old = (atomic_dir.beside(tmp_path / "checkpoint-1", token) for token in ("0123456789ab", "old-0123456789ab"))
    for folder in (left, old):
        folder.mkdir()
        (folder / "rank-00000.safetensors").touch()
    trained(arguments(tiny_folder, tmp_path, max_steps=2, resume=tmp_path))
    assert not left.exists() and old.exists()
    told = [(record["step"], "validation_loss" in record) for record in read_metrics(tmp_path / METRICS)]
    assert len(told) == len(set(told))


@pytest.mark.parametrize(("precision", "most"), [("fp32", MAX_SKIPPED), ("fp16", MAX_SKIPPED_FP16)])
@pytest.mark.filterwarnings("ignore:step skipped")
def test_steps_that_are_all_skipped_end_the_run_with_units_and_checkpoint(
    tiny_folder, tmp_path, monkeypatch, precision, most
):
    whole, num_losses = train_medqa.label_loss, 0

    def loss(*given):
        nonlocal num_losses
        num_losses += 1
        return whole(*given) * (1 if num_losses == 1 else float("inf"))

    monkeypatch.setattr(train_medqa, "label_loss", loss)
    options = {"precision": precision, "max_steps": 100, "per_device_train_batch_size": 8, "save_steps": 5}
    with pytest.raises(Diverged) as stopped:
        trained(arguments(tiny_folder, tmp_path, gradient_accumulation_steps=1, **options))
    text = str(stopped.value)
    assert f"stopped at step {most + 1}: {most} steps were skipped" in text and "model.layers.0" in text
    assert str(resume.checkpoints(tmp_path)[-1]) in text


@pytest.mark.filterwarnings("ignore:step skipped")
def test_a_run_that_took_no_step_exports_nothing(tiny_folder, tmp_path, monkeypatch, capsys):
    whole = train_medqa.label_loss
    monkeypatch.setattr(train_medqa, "label_loss", lambda *given: whole(*given) * float("nan"))
    monkeypatch.setattr(sys, "argv", ["train_medqa.py", *arguments(tiny_folder, tmp_path)])
    assert train_medqa.main() == 1
    assert "there is no result" in capsys.readouterr().err
    assert not list(tmp_path.glob("**/model.safetensors"))


def test_a_validation_loss_that_is_nan_ends_the_run(tmp_path):
    broken = tiny_llama()
    broken.model.norm.weight.data.fill_(float("nan"))
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(Diverged, match="stopped at step 0: the validation loss is nan.*its files are damaged, or"):
        trained(arguments(tmp_path / "broken", tmp_path / "out"))


@pytest.mark.parametrize("kind", ["model", "tokenizer"])
def test_code_of_a_folder_is_neither_run_nor_asked_about(tmp_path, monkeypatch, kind):
    """Its owner would have to say y; nobody is asked."""
    tiny_llama().save_pretrained(tmp_path)
    for path in (CORPUS / "tokenizer").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')\nclass Own: pass\n")
    name, entries = {
        "model": ("config.json", {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}),
        "tokenizer": (
            "tokenizer_config.json",
            {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}},
        ),
    }[kind]
    path = tmp_path / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    monkeypatch.setattr("builtins.input", lambda *text: pytest.fail(f"asked {text}"))
    options = parse(["--model_name_or_path", str(tmp_path), "--cutoff_len", "64"])
    attempts = [lambda: model.load_config(options, model.load_tokenizer(options))]
    if kind == "model":
        attempts.append(lambda: zerolite.load_pretrained(tmp_path, stage=2))
    for attempt in attempts:
        try:
            attempt()
        except ValueError as error:
            assert str(tmp_path) in str(error) and "never run" in str(error)
        else:
            assert kind == "tokenizer"  # a class of transformers reads it
    assert not (tmp_path / "was-run").exists()


def test_pipes_are_refused_by_name(tmp_path):
    pipe = tmp_path / "rows"
    os.mkfifo(pipe)
    with pytest.raises(zerolite.DataError, match="rows: cannot be read: expected a file, got a pipe"):
        data.read([pipe])
    with pytest.raises(ValueError, match="--config .*rows: expected a YAML file"):
        parse(["--config", str(pipe)])


def test_a_url_in_place_of_a_path_is_refused_without_its_password(tmp_path, monkeypatch, capsys):
    url = "https://somebody:hf_secret@huggingface.co/a/b"
    monkeypatch.setattr(sys, "argv", ["train_medqa.py", "--model_name_or_path", url, "--output_dir", str(tmp_path)])
    assert train_medqa.main() == 2
    said = capsys.readouterr()
    assert "hf_secret" not in said.out + said.err and "***@huggingface.co/a/b: expected a local folder" in said.err


@pytest.mark.parametrize("key", ["output", "instruction"])
def test_rows_of_any_depth_are_rejected_by_line(tmp_path, key):
    """json reads a level deeper than it writes, and how deep that is depends on the stack."""
    rows = []
    for depth in range(100, 1100, 7):
        nested = "[" * depth + "]" * depth
        rows.append(f'{{"instruction": "a", "output": "b", "{key}": {nested}}}')
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*rows, '{"instruction": "a", "output": "b"}']))
    read = data.read([path], skip_invalid=True)
    assert [reject.line for reject in read.rejected] == list(range(1, len(rows) + 1)) and len(read.kept) == 1
