"""What a run tells of the model before and after: the loss of each language, and answers to held-out questions."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from medqa_runs import tiny_llama, to_flags
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_medqa
from zerolite.medqa import answers, data
from zerolite.medqa.arguments import CORPUS, parse
from zerolite.medqa.batches import collate
from zerolite.medqa.processes import StopSignals, join
from zerolite.medqa.prompts import encode

NUM_ROWS = 7  # of each language: rank 1 has fewer of them, and its last micro-batch is empty
CUTOFF = 96


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A random model with weights so large that it says something else after each token."""
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(initializer_range=0.4).save_pretrained(folder)
    return folder


def arguments(base: Path | None, output: Path, **options) -> list[str]:
    start = {} if base is None else {"model_name_or_path": base, "tokenizer_name_or_path": CORPUS / "tokenizer"}
    sizes = {"cutoff_len": CUTOFF, "max_samples": NUM_ROWS, "max_steps": 3, "per_device_train_batch_size": 2}
    return to_flags({**start, **sizes, "learning_rate": 1e-2, "output_dir": output, **options})


def trained(argv: list[str]) -> int:
    return train_medqa.train(train_medqa.prepare(parse(argv)))


def plain_losses(folder: Path) -> dict[str, float]:
    """transformers' own loss, row by row, weighted by label tokens."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(CORPUS / "tokenizer")
    sums, num_labels = {}, {}
    for language in ("en", "zh"):
        rows = data.read([CORPUS / f"validation.{language}.jsonl"], max_samples=NUM_ROWS).kept
        examples, _ = encode(rows, tokenizer, CUTOFF)
        with torch.no_grad():
            losses = [model(**collate([e], 0)).loss.item() * e.num_labels for e in examples]
        sums[language], num_labels[language] = sum(losses), sum(e.num_labels for e in examples)
    joint = sum(sums.values()) / sum(num_labels.values())
    each = {f"validation_loss_{name}": sums[name] / num_labels[name] for name in sums}
    return {"validation_loss": joint, **each}


def plain_answers(folder: Path) -> list[str]:
    """Of transformers alone, from the prompts that `apply_chat_template` makes."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder.parent / "model"),
    )
    found = []
    for language in ("en", "zh"):
        for row in data.read([CORPUS / f"validation.{language}.jsonl"], max_samples=2).kept:
            message = [{"role": "user", "content": row.turns[0][0]}]
            ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt")["input_ids"]
            output = model.generate(
                ids, do_sample=False, repetition_penalty=1.1, max_new_tokens=CUTOFF - ids.shape[1], eos_token_id=1
            )
            text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
            found.append(text if output[0, -1] == 1 else text.rstrip("\ufffd") + " …")
    return found


def validations(output: Path) -> list[dict]:
    records = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if "validation_loss" in record]


def test_losses_of_each_language_and_both_answers_are_those_of_plain_transformers(ranks, base, tmp_path):
    assert ranks(2).run(trained, arguments(base, tmp_path, stage=3)) == [0, 0]
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    (tmp_path / "before").symlink_to(base)  # so that its tokenizer is the written one too
    for name, folder, record in zip(("before", "after"), ("before", "model"), validations(tmp_path), strict=True):
        expected = plain_losses(tmp_path / folder)
        assert {key: record[key] for key in expected} == pytest.approx(expected, rel=1e-5)
        (row,) = [line for line in report.splitlines() if line.startswith(f"| {name} |")]
        shown = [f"{record[f'validation_loss_{language}']:.4f}" for language in ("en", "zh")]
        assert row.endswith(f"| {' | '.join(shown)} |")
        said = [one.generated for one in answers.read(tmp_path) if one.step == record["step"]]
        assert said == plain_answers(tmp_path / folder)
        assert all(f"**{name.title()} training** {text}" in report for text in said)
    assert len({one.generated for one in answers.read(tmp_path)}) > 4, "the model says too little to compare"
    assert report.count(f"*{answers.NOTICE}*") == 4 and "| change | |" in report
    assert all(answers.NOTICE in line for line in (tmp_path / answers.ANSWERS).read_text().splitlines())


def test_a_set_of_one_language_has_that_language_only(base, tmp_path, capsys):
    rows = {"validation_file": CORPUS / "validation.zh.jsonl"}
    assert trained(arguments(base, tmp_path, **rows)) == 0
    for record in validations(tmp_path):
        assert record["validation_loss_zh"] == record["validation_loss"] and "validation_loss_en" not in record
    assert "(zh " in capsys.readouterr().out


def test_a_model_from_scratch_is_not_asked_before_it_learned(base, tmp_path):
    """Answers of an earlier run, whose result was moved away, are not shown as its own."""
    assert trained(arguments(base, tmp_path)) == 0
    shutil.rmtree(tmp_path / "model")
    assert trained(arguments(None, tmp_path, max_steps=1)) == 0
    assert [one.step for one in answers.read(tmp_path)] == [1] * 4
    assert "**Before training**" not in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_a_resumed_run_shows_what_was_answered_before_it_was_stopped(base, tmp_path):
    assert trained(arguments(base, tmp_path, save_steps=2)) == 0
    first = answers.read(tmp_path)
    assert trained(arguments(base, tmp_path, resume=tmp_path)) == 0
    assert answers.read(tmp_path) == first and [one.step for one in first] == [0] * 4 + [3] * 4


def test_a_signal_ends_an_answer_at_its_next_token(base, tmp_path):
    run = train_medqa.prepare(parse(arguments(base, tmp_path)))
    rows = answers.held_out_questions(run.corpus.validation_rows)
    num_passes = 0

    def count(*_):
        nonlocal num_passes
        num_passes += 1
        if num_passes == 3:
            signal.raise_signal(signal.SIGTERM)

    run.model.register_forward_pre_hook(count)
    with StopSignals() as signals:
        assert answers.answer(run.model, run.tokenizer, rows, join(), CUTOFF, signals) is None
        train_medqa.ask(run, signals)
    assert num_passes <= 3 + 2 * len(rows) and not (tmp_path / answers.ANSWERS).exists()
