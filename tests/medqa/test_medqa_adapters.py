"""train_medqa.py with adapters, from the command line to a folder that PEFT opens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from medqa_runs import needs_shared, to_flags
from models import assert_same_bits
from paths import SHARED
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_medqa
import zerolite
from zerolite.medqa import data
from zerolite.medqa.arguments import CORPUS, parse
from zerolite.medqa.batches import collate
from zerolite.medqa.prompts import encode

METHODS = ("lora", "prompt", "prefix", "p-tuning", "p-tuning-v2")


def arguments(base: Path, output: Path, **options) -> list[str]:
    options = {
        "model_name_or_path": base,
        "tokenizer_name_or_path": CORPUS / "tokenizer",
        "cutoff_len": 96,
        "max_samples": 12,
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 0.02,
        "num_virtual_tokens": 6,
        "output_dir": output,
        **options,
    }
    if options.get("finetuning_type") in ("lora", "full", None):
        del options["num_virtual_tokens"]
    return to_flags(options)


def tuned(argv: list[str]) -> dict[str, torch.Tensor]:
    """Run train_medqa.py's two halves; the adapter that it ends with."""
    run = train_medqa.prepare(parse(argv))
    assert train_medqa.train(run) == 0
    return {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}


def records(output: Path, key: str) -> list[dict]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if key in record]


def loss_with_peft(base: Path, adapter: Path, tokenizer_folder: Path, rows: list, cutoff_len: int) -> float:
    """Mean loss a label token of the adapter as PEFT loads it, by transformers' own loss."""
    peft = pytest.importorskip("peft")
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    examples, _ = encode(rows, tokenizer, cutoff_len)
    total, num_labels = 0.0, 0
    with torch.no_grad():
        for example in examples:
            total += model(**collate([example], tokenizer.eos_token_id)).loss.item() * example.num_labels
            num_labels += example.num_labels
    return total / num_labels


@pytest.mark.parametrize("method", METHODS)
def test_each_method_learns_and_peft_opens_the_result(ranks, base, tmp_path, method):
    """Two ranks at stage 2; the prefix with activation checkpointing. PEFT's loss is the one that the run reports."""
    options = dict(finetuning_type=method, stage=2)
    if method == "prefix":
        options["gradient_checkpointing"] = True
    first, second = ranks(2).run(tuned, arguments(base, tmp_path, **options))
    assert_same_bits(first, second)
    before, after = (record["validation_loss"] for record in records(tmp_path, "validation_loss"))
    assert after < before
    rows = data.read(sorted(CORPUS.glob("validation.*.jsonl")), max_samples=12).kept
    assert loss_with_peft(base, tmp_path / "adapter", CORPUS / "tokenizer", rows, 96) == pytest.approx(after, rel=1e-5)
    assert not (tmp_path / "model").exists()
    report = (tmp_path / "report.md").read_text()
    assert f"| trained ({method}) |" in report and "| frozen |" in report


@needs_shared
@pytest.mark.parametrize("method", METHODS)
def test_each_method_on_shared_rows(ranks, tmp_path, method):
    """A trained base, real questions in both languages, each method's own defaults but for the number of steps."""
    shared_base = SHARED / "models" / "stories260K-hf"
    files = {"train_file": SHARED / "medqa" / "train.jsonl", "validation_file": SHARED / "medqa" / "val.jsonl"}
    options = {"model_name_or_path": shared_base, "max_samples": 24, "max_steps": 6, "cutoff_len": 128, **files}
    options |= {"finetuning_type": method, "stage": 2, "output_dir": tmp_path}
    ranks(2).run(tuned, to_flags(options | ({"gradient_checkpointing": True} if method == "prefix" else {})))
    before, after = (record["validation_loss"] for record in records(tmp_path, "validation_loss"))
    assert after < before
    rows = data.read([files["validation_file"]], max_samples=24).kept
    assert loss_with_peft(shared_base, tmp_path / "adapter", shared_base, rows, 128) == pytest.approx(after, rel=1e-4)


@pytest.mark.parametrize("method", ["lora", "p-tuning-v2"])
def test_stages_and_offload_change_no_bit(ranks, base, tmp_path, method):
    options = dict(finetuning_type=method, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    runs = {"0": dict(stage=0), "3": dict(stage=3), "offload": dict(stage=3, offload="cpu", offload_parameters=True)}
    expected, _ = ranks(2).run(tuned, arguments(base, tmp_path / "2", stage=2, **options))
    saved = load_file(tmp_path / "2" / "adapter" / "adapter_model.safetensors")
    for name, changed in runs.items():
        first, second = ranks(2).run(tuned, arguments(base, tmp_path / name, **options, **changed))
        assert_same_bits(first, expected)
        assert_same_bits(second, expected)
        assert_same_bits(load_file(tmp_path / name / "adapter" / "adapter_model.safetensors"), saved)


def test_resuming_an_adapter_is_exact_and_its_checkpoint_is_small(ranks, base, tmp_path):
    """LoRA's dropout included; the checkpoint leaves the frozen base out."""
    options = dict(finetuning_type="lora", save_steps=2, lora_dropout=0.3)
    straight, _ = ranks(2).run(tuned, arguments(base, tmp_path / "a", stage=2, **options))
    checkpoint = tmp_path / "a" / "checkpoint-2"
    trained_bytes = sum(value.nbytes for value in straight.values())
    assert sum(path.stat().st_size for path in checkpoint.iterdir()) < 4 * trained_bytes + 60_000
    again = arguments(base, tmp_path / "b", stage=3, resume=checkpoint, **options)
    resumed, _ = ranks(2).run(tuned, again)
    assert_same_bits(resumed, straight)


def test_the_merged_model_is_the_adapted_one(ranks, base, tmp_path):
    """A folder that transformers opens alone, with the loss that the run reports."""
    argv = arguments(base, tmp_path, finetuning_type="lora", stage=3, lora_target="all-linear", use_rslora=True)
    ranks(2).run(tuned, [*argv, "--export_merged"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    rows = data.read(sorted(CORPUS.glob("validation.*.jsonl")), max_samples=12).kept
    examples, _ = encode(rows, tokenizer, 96)
    with torch.no_grad():
        losses = [model(**collate([e], tokenizer.eos_token_id)).loss.item() * e.num_labels for e in examples]
    _, after = (record["validation_loss"] for record in records(tmp_path, "validation_loss"))
    assert sum(losses) / sum(e.num_labels for e in examples) == pytest.approx(after, rel=1e-5)
    assert load_file(tmp_path / "model" / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()


@pytest.mark.parametrize(("precision", "method"), [("bf16", "lora"), ("fp16", "prefix")])
def test_adapters_in_sixteen_bits(ranks, base, tmp_path, precision, method):
    argv = arguments(base, tmp_path, finetuning_type=method, precision=precision, stage=3, max_steps=6)
    values, _ = ranks(2).run(tuned, argv)
    assert all(torch.isfinite(value.float()).all() for value in values.values())
    before, after = (record["validation_loss"] for record in records(tmp_path, "validation_loss"))
    assert after < before


def test_the_stage_is_chosen_by_what_fits(base, tmp_path, monkeypatch, capsys):
    from zerolite.medqa import tuning

    argv = arguments(base, tmp_path / "a", finetuning_type="lora")
    assert train_medqa.prepare(parse(argv)).options.stage == 2
    assert "stage 2: the frozen base takes" in capsys.readouterr().out
    monkeypatch.setattr(tuning, "memory_bytes", lambda device: 100_000)
    assert train_medqa.prepare(parse(arguments(base, tmp_path / "b", finetuning_type="lora"))).options.stage == 3
    out = capsys.readouterr().out
    assert "stage 3: the frozen base takes" in out and "gathered for every micro-batch" in out
    assert train_medqa.prepare(parse(arguments(base, tmp_path / "c"))).options.stage == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lora_target": "no_such_layer"}, "no_such_layer"),
        ({"finetuning_type": "prompt", "prompt_encoder": "mlp"}, "encoder"),
        ({"finetuning_type": "prefix", "prompt_encoder": "lstm"}, "encoder"),
    ],
)
def test_mistakes_about_adapters_are_found_before_training(base, tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        train_medqa.prepare(parse(arguments(base, tmp_path, **{"finetuning_type": "lora", **changed})))


def test_rows_without_eos_are_refused(base, tmp_path, monkeypatch):
    """A model that never sees EOS in its labels never learns to stop."""
    run_corpus = train_medqa.corpus.load

    def without_eos(*args, **kwargs):
        loaded = run_corpus(*args, **kwargs)
        loaded.train[3].labels[-1] = 7
        return loaded

    monkeypatch.setattr(train_medqa.corpus, "load", without_eos)
    with pytest.raises(zerolite.DataError, match="row 3 of the training data does not end with EOS"):
        train_medqa.prepare(parse(arguments(base, tmp_path)))
