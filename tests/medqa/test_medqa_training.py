"""Training in this process and on a pool of ranks: the same rows give the same parameters however they are divided."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from medqa_runs import needs_shared, tiny_llama, to_flags
from models import assert_same_bits
from paths import SHARED
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_medqa
import zerolite
from zerolite.medqa import corpus, data, resume
from zerolite.medqa.arguments import CORPUS, parse
from zerolite.medqa.batches import Order, collate, micro_batches
from zerolite.medqa.loss import label_loss
from zerolite.medqa.processes import join
from zerolite.medqa.prompts import encode


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory) -> Path:
    """A model folder with dropout, so that a resumed run needs its random states."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama(attention_dropout=0.2).save_pretrained(folder)
    return folder


def arguments(folder: Path, output: Path, **options) -> list[str]:
    options = {
        "model_name_or_path": folder,
        "tokenizer_name_or_path": CORPUS / "tokenizer",
        "cutoff_len": 128,
        "max_samples": 11,
        "max_steps": 4,
        "logging_steps": 1,
        "output_dir": output,
        **options,
    }
    return to_flags(options)


def trained(argv: list[str]) -> dict[str, torch.Tensor]:
    """Run train_medqa.py's two halves; the parameters that it ends with."""
    run = train_medqa.prepare(parse(argv))
    assert train_medqa.train(run) == 0
    with zerolite.full_params(run.model):
        return {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}


# The division of a step's rows #


def divided(batch_rows: int, accumulation: int) -> dict[str, torch.Tensor]:
    """Parameters after an epoch of three steps of eight rows and one of six, in fp64."""
    tokenizer = AutoTokenizer.from_pretrained(CORPUS / "tokenizer")
    rows = data.read(sorted(CORPUS.glob("train.*.jsonl")), max_samples=15).kept
    examples, _ = encode(rows, tokenizer, 128)
    ranks = join()
    model = zerolite.shard(tiny_llama().double(), stage=2)
    optimizer = zerolite.AdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0)
    order = Order([len(e.input_ids) for e in examples], ranks.world_size * batch_rows * accumulation, seed=1)
    for _, chosen in order.steps(0, 4):
        num_labels = sum(examples[row].num_labels for row in chosen)
        parts = micro_batches(chosen, ranks.rank, ranks.world_size, batch_rows)
        for index, part in enumerate(parts):
            with zerolite.no_sync(model, enabled=index + 1 < len(parts)):
                loss = label_loss(model, collate([examples[row] for row in part], 0))
                (loss * (ranks.world_size / num_labels)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_batch_accumulation_and_ranks_give_the_same_parameters(ranks):
    (whole,) = ranks(1, distributed=False).run(divided, 8, 1)
    (accumulated,) = ranks(1).run(divided, 4, 2)
    spread, _ = ranks(2).run(divided, 4, 1)
    thin, _ = ranks(2).run(divided, 1, 4)
    for name, value in whole.items():
        for other in (accumulated, spread, thin):
            torch.testing.assert_close(other[name], value, rtol=1e-7, atol=1e-9, msg=name)


def test_label_loss_is_that_of_transformers():
    """Its mean over labels times their number; no label at all gives a zero that backward passes through."""
    tokenizer = AutoTokenizer.from_pretrained(CORPUS / "tokenizer")
    examples, _ = encode(data.read([CORPUS / "train.zh.jsonl"], max_samples=3).kept, tokenizer, 128)
    model = tiny_llama()
    batch = collate(examples, 0)
    num_labels = sum(example.num_labels for example in examples)
    expected = model(**batch).loss * num_labels
    torch.testing.assert_close(label_loss(model, batch), expected)
    apart = sum(label_loss(model, collate([example], 0)) for example in examples)
    torch.testing.assert_close(apart, expected)
    nothing = label_loss(model, collate([], 0))
    nothing.backward()
    assert nothing.item() == 0 and not any(p.grad.any() for p in model.parameters())


# Whole runs #


def test_stages_agree_and_leave_a_whole_result(ranks, tiny_folder, tmp_path):
    """21 rows over 2 ranks x 2 rows x 2: one step of an epoch has five rows, so rank 1 has an empty micro-batch."""
    files = {f"{name}_file": CORPUS / f"{name}.zh.jsonl" for name in ("train", "validation")}
    files["max_samples"] = 21
    options = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=6, **files)
    results = []
    for stage in range(4):
        output = tmp_path / f"stage{stage}"
        first, second = ranks(2).run(trained, arguments(tiny_folder, output, stage=stage, **options))
        assert_same_bits(first, second)
        results.append(first)
        assert_same_bits(first, results[0])
        records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 6]
        assert [r["step"] for r in records if "validation_loss" in r] == [0, 6]
        keys = {"learning_rate", "grad_norm", "tokens_per_second", "peak_memory_bytes", "epoch", "num_skipped_steps"}
        assert all(keys <= r.keys() for r in records if "loss" in r)
        report = (output / "report.md").read_text()
        assert report.count("**Before training**") == report.count("**After training**") == 4
        assert "| before | 0 |" in report and f"stage {stage}, fp32" in report
        assert (output / "loss.png").stat().st_size > 1000 and (output / "options.yaml").is_file()
        assert parse(["--config", str(output / "options.yaml")]).stage == stage
    exported = AutoModelForCausalLM.from_pretrained(output / "model").state_dict()
    assert all(torch.equal(exported[name], value) for name, value in results[0].items())
    assert AutoTokenizer.from_pretrained(output / "model").eos_token_id == 1


def test_resuming_is_exact(ranks, tiny_folder, tmp_path):
    options = dict(stage=3, save_steps=3, max_steps=7, num_train_epochs=9, per_device_train_batch_size=4)
    straight, _ = ranks(2).run(trained, arguments(tiny_folder, tmp_path / "a", **options))
    assert [path.name for path in resume.checkpoints(tmp_path / "a")] == ["checkpoint-3", "checkpoint-6"]
    options["resume"] = tmp_path / "a" / "checkpoint-3"
    resumed, _ = ranks(2).run(trained, arguments(tiny_folder, tmp_path / "b", **options))
    assert_same_bits(resumed, straight)
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    again = [json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    losses = {r["step"]: (r["loss"], r["learning_rate"], r["grad_norm"]) for r in lines if "loss" in r}
    assert {r["step"]: (r["loss"], r["learning_rate"], r["grad_norm"]) for r in again if "loss" in r} == {
        step: losses[step] for step in (4, 5, 6, 7)
    }
    options["resume"] = tmp_path / "a"  # the newest one, in the folder itself: its metrics go on
    resumed, _ = ranks(2).run(trained, arguments(tiny_folder, tmp_path / "a", **options))
    assert_same_bits(resumed, straight)
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines if "loss" in r] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(("precision", "optim"), [("bf16", "lion"), ("fp16", "lamb"), ("bf16", "adam")])
def test_precisions_and_optimizers(ranks, tiny_folder, tmp_path, precision, optim):
    argv = arguments(tiny_folder, tmp_path, stage=3, precision=precision, optim=optim, lr_scheduler_type="constant")
    parameters, _ = ranks(2).run(trained, [*argv, "--gradient_checkpointing", "--no-export"])
    assert all(torch.isfinite(value.float()).all() for value in parameters.values())
    assert [path.name for path in resume.checkpoints(tmp_path)] == ["checkpoint-4"]  # in place of the export
    row = next(line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("| formula"))
    assert "2Φ/N" in row and "4Φ/N" in row and ("8Φ/N" if optim == "lion" else "12Φ/N") in row


def test_memory_is_the_formula_plus_padding(ranks, tiny_folder, tmp_path):
    """Over all ranks, since padding and odd sizes may give one rank a little more than another."""
    for stage in range(4):
        output = tmp_path / str(stage)
        ranks(2).run(trained, arguments(tiny_folder, output, stage=stage, max_steps=1))
        counted, formula = memory_of(output)
        assert sum(rank["sum"] - rank["of it padding"] for rank in counted) == 2 * formula["sum"], stage
        shown = table_rows(output)  # in MiB
        assert shown["formula"]["sum"].endswith(f" = {formula['sum'] / 2**20:.3f}")
        assert all(shown[str(rank)]["sum"] == f"{counted[rank]['sum'] / 2**20:.3f}" for rank in (0, 1))


def memory_of(output: Path) -> tuple[list[dict[str, int]], dict[str, int]]:
    """Bytes by column: of each rank, and of the formula."""
    values = json.loads((output / "memory.json").read_text())
    return values["bytes_of_each_rank"], values["bytes_by_formula"]


def table_rows(output: Path) -> dict[str, dict[str, str]]:
    """The memory table of a report: row's name -> column -> cell."""
    lines = (output / "report.md").read_text().splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("| rank |"))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:] if line.startswith("|")]
    return {row[0]: dict(zip(cells[0], row, strict=True)) for row in cells[2:]}


def test_offloading_changes_no_number(ranks, tiny_folder, tmp_path):
    """All or a part of it, at any stage, and resumed with and without it."""
    options = dict(save_steps=2, max_steps=4, per_device_train_batch_size=2)
    straight, _ = ranks(2).run(trained, arguments(tiny_folder, tmp_path / "none", **options))
    for name, changed in {
        "all": dict(stage=0, offload_workers=2),
        "part": dict(stage=2, offload_budget="900KB"),
        "streamed": dict(stage=3, offload_parameters=True),
    }.items():
        argv = arguments(tiny_folder, tmp_path / name, offload="cpu", **changed, **options)
        offloaded, _ = ranks(2).run(trained, argv)
        assert_same_bits(offloaded, straight)
        (row, _), _ = memory_of(tmp_path / name)
        assert row["in host memory"] > 0
        assert (row["gradients"] > 0) == (name == "part") and (row["parameters"] > 0) == (name != "streamed")
    back = dict(offload="none")
    for name, changed in {"none": dict(offload="cpu"), "part": back, "streamed": dict(stage=1, **back)}.items():
        again = dict(resume=tmp_path / name / "checkpoint-2", **options)
        resumed, _ = ranks(2).run(trained, arguments(tiny_folder, tmp_path / f"{name} again", **again, **changed))
        assert_same_bits(resumed, straight)


@pytest.mark.parametrize(("states", "width"), [("bf16", 12), ("int8", 10.0625)])
def test_states_of_fewer_bits(ranks, tiny_folder, tmp_path, states, width):
    """They learn what fp32 states do, in as many host bytes as the formula says, and a page and scratch a field."""
    options = dict(precision="bf16", offload="cpu", max_steps=4, per_device_train_batch_size=4)
    losses = []
    for kept in ("fp32", states):
        ranks(2).run(trained, arguments(tiny_folder, tmp_path / kept, offload_states=kept, **options))
        losses.append(json.loads((tmp_path / kept / "metrics.jsonl").read_text().splitlines()[-1])["validation_loss"])
    assert losses[1] != losses[0] and losses[1] == pytest.approx(losses[0], rel=0.01)
    assert table_rows(tmp_path / states)["formula"]["in host memory"].startswith(f"{width:g}Φ/N = ")
    (counted, _), formula = memory_of(tmp_path / states)
    assert formula["in host memory"] <= counted["in host memory"] <= formula["in host memory"] + 2**18


def test_states_on_a_drive(ranks, tiny_folder, tmp_path):
    options = dict(max_steps=2, offload="cpu", offload_path=tmp_path, optim="lion")
    ranks(2).run(trained, arguments(tiny_folder, tmp_path / "out", **options))
    (row, _), _ = memory_of(tmp_path / "out")
    assert row["on the drive"] > 0 and {path.name for path in tmp_path.iterdir()} == {"out"}


@needs_shared
def test_shared_rows_and_a_pretrained_start_at_every_stage(ranks, tmp_path):
    results = []
    for stage in range(4):
        options = {"model_name_or_path": SHARED / "models" / "stories260K-hf", **shared_rows(tmp_path / str(stage))}
        results.append(ranks(2).run(trained, to_flags({**options, "cutoff_len": 512, "stage": stage}))[0])
        assert_same_bits(results[0], results[-1])


@needs_shared
def test_shared_rows_with_a_merged_tokenizer(ranks, tmp_path):
    """No pad token, no chat template, 48,235 pieces."""
    merged = {"tokenizer_name_or_path": SHARED / "tokenizers" / "mistral-zh-merged"}
    ranks(2).run(trained, to_flags({**merged, **shared_rows(tmp_path)}))
    assert AutoTokenizer.from_pretrained(tmp_path / "model").eos_token == "</s>"


def shared_rows(output: Path) -> dict:
    files = {"train_file": SHARED / "medqa" / "train.jsonl", "validation_file": SHARED / "medqa" / "val.jsonl"}
    return {**files, "max_samples": 9, "max_steps": 2, "output_dir": output}


def test_invalid_rows_are_written_down(tiny_folder, tmp_path):
    rows = (CORPUS / "train.en.jsonl").read_text(encoding="utf-8").splitlines()[:5]
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows[:2], "{}", *rows[2:]]), encoding="utf-8")
    argv = arguments(tiny_folder, tmp_path / "out", train_file=tmp_path / "rows.jsonl", max_steps=1)
    with pytest.raises(zerolite.DataError, match=r"rows\.jsonl, line 3: expected keys"):
        train_medqa.prepare(parse(argv))
    options = parse([*argv, "--skip_invalid"])
    loaded = corpus.load(options, AutoTokenizer.from_pretrained(CORPUS / "tokenizer"), tmp_path / "rejected.jsonl")
    assert "train: 6 rows read, 5 kept, 1 rejected" in loaded.summary
    (reject,) = (json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines())
    assert (reject["file"], reject["line"]) == (str(tmp_path / "rows.jsonl"), 3) and "expected keys" in reject["reason"]


# The user's mistakes #


def test_mistakes_are_found_before_any_work(tiny_folder, tmp_path):
    weightless, odd = tmp_path / "weightless", tmp_path / "odd"
    weightless.mkdir()
    (weightless / "config.json").write_text((tiny_folder / "config.json").read_text())
    odd.mkdir()
    (odd / "config.json").write_text("{}")
    (odd / "model.safetensors").write_bytes(b"")
    (tmp_path / "file").write_text("")
    (tmp_path / "used" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "used" / "checkpoint-5" / "manifest.json").write_text("{}")
    for changed, message in [
        ({"model_name_or_path": tmp_path / "absent"}, "absent: expected a local folder, there is none"),
        ({"model_name_or_path": tmp_path}, "expected config.json in it, there is none"),
        ({"model_name_or_path": weightless}, "expected *.safetensors in it, there is none"),
        ({"model_name_or_path": odd}, "config.json cannot be used"),
        ({"tokenizer_name_or_path": tmp_path / "absent"}, "--tokenizer_name_or_path"),
        ({"tokenizer_name_or_path": weightless}, "no usable tokenizer"),
        ({"cutoff_len": 257}, "--cutoff_len 257: this model reads at most 256 tokens"),
        ({"output_dir": tmp_path / "file" / "out"}, "cannot be written: Not a directory"),
        ({"output_dir": "/proc/zerolite"}, "--output_dir /proc/zerolite: cannot be written"),
        ({"output_dir": tmp_path / "used"}, "holds checkpoint-5 of an earlier run; go on from it with --resume"),
        ({"resume": tmp_path}, "expected a checkpoint, or a folder of complete checkpoint-N; there is none"),
    ]:
        with pytest.raises(ValueError) as error:
            train_medqa.prepare(parse(arguments(tiny_folder, tmp_path / "out", **changed)))
        assert message in str(error.value), changed
    small = {"model_name_or_path": SHARED / "models" / "stories260K-hf"}
    if SHARED.is_dir():
        with pytest.raises(ValueError, match="the tokenizer has 4096 pieces, the model only 512 embeddings"):
            train_medqa.prepare(parse(arguments(tiny_folder, tmp_path / "out", **small)))


def refused(argv: list[str]) -> str:
    with pytest.raises(ValueError) as error:
        train_medqa.prepare(parse(argv))
    return str(error.value)


def test_a_checkpoint_of_other_data_is_refused(ranks, tiny_folder, tmp_path):
    ranks(1).run(trained, arguments(tiny_folder, tmp_path / "a", save_steps=2))
    again = {"resume": tmp_path / "a"}
    for changed, message in [
        ({"seed": 7}, "--seed was 42 there and is 7 here"),
        ({"max_samples": 10}, "fingerprint of the tokenised training rows was"),
        ({"per_device_train_batch_size": 5}, "rows of an optimizer step (ranks x batch x accumulation) was 4 there"),
    ]:
        (text,) = ranks(1).run(refused, arguments(tiny_folder, tmp_path / "b", **again, **changed))
        assert message in text
