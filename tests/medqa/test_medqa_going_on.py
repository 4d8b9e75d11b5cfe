"""Do options given beside --resume have their effect, or are they refused by name?"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from medqa_runs import tiny_llama, to_flags
from models import assert_same_bits

import train_medqa
import zerolite
from zerolite.medqa.arguments import CORPUS, OPTIONS, options_file, parse
from zerolite.medqa.opening import print_of
from zerolite.medqa.progress import METRICS, read_metrics


@pytest.fixture(scope="module")
def run(base, tmp_path_factory) -> Path:
    """What a LoRA run of four steps left, with checkpoints of the second and the fourth."""
    folder = tmp_path_factory.mktemp("runs") / "lora"
    trained(first(base, folder))
    return folder


@pytest.fixture
def left(run, tmp_path) -> Path:
    """A copy of it, elsewhere, as it was at its second step."""
    shutil.copytree(run, tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "checkpoint-4")
    return tmp_path / "moved"


def first(base: Path, output: Path, **options) -> list[str]:
    named = {"model_name_or_path": base, "tokenizer_name_or_path": CORPUS / "tokenizer", "output_dir": output}
    sizes = {"cutoff_len": 64, "max_samples": 4, "max_steps": 4, "save_steps": 2, "logging_steps": 1, "eval_steps": 0}
    method = {"finetuning_type": "lora", "learning_rate": 1e-2, "per_device_train_batch_size": 2, "weight_decay": 0.5}
    return to_flags({**named, **sizes, **method, "lr_scheduler_type": "constant", "warmup_ratio": 0, **options})


def trained(argv: list[str]) -> dict[str, torch.Tensor]:
    run = train_medqa.prepare(parse(argv))
    assert train_medqa.train(run) == 0
    return {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}


def rates(folder: Path) -> dict[int, float]:
    return {one["step"]: one["learning_rate"] for one in read_metrics(folder / METRICS) if "loss" in one}


def test_the_folder_alone_is_enough_wherever_it_lies_now(run, left, base):
    again = trained(["--resume", str(left)])
    assert (left / "checkpoint-4").is_dir()
    assert_same_bits(again, trained(["--resume", str(run)]))  # that one is at its end: nothing is trained
    assert (left / OPTIONS).read_text() == (run / OPTIONS).read_text().replace(str(run), str(left))
    assert options_file(left / "checkpoint-2") == left / OPTIONS
    told = [(record["step"], "validation_loss" in record) for record in read_metrics(run / METRICS)]
    assert len(told) == len(set(told))


def test_rate_decay_and_clipping_are_applied(left, capsys):
    run = train_medqa.prepare(
        parse(["--resume", str(left), "--lr", "5e-3", "--weight_decay", "0", "--max_grad_norm", "0.25"])
    )
    assert "--learning_rate 0.01 -> 0.005; --weight_decay 0.5 -> 0.0" in capsys.readouterr().out
    assert [(g["lr"], g["initial_lr"], g["weight_decay"]) for g in run.optimizer.param_groups] == [(5e-3, 5e-3, 0.0)]
    assert run.optimizer.max_grad_norm == 0.25 and run.position.step == 2
    assert train_medqa.train(run) == 0
    assert rates(left) == {1: 1e-2, 2: 1e-2, 3: 5e-3, 4: 5e-3}
    assert "learning_rate: 0.005" in (left / OPTIONS).read_text()


def test_more_steps_stretch_the_schedule_from_the_first_step_on(left):
    trained(["--resume", str(left), "--max_steps", "6", "--lr_scheduler_type", "linear"])
    assert rates(left) == pytest.approx({1: 1e-2, 2: 1e-2, 3: 5e-3, 4: 1e-2 / 3, 5: 1e-2 / 6, 6: 0})


def test_epochs_on_the_command_line_take_the_place_of_the_files_steps(left):
    assert parse(["--resume", str(left)]).max_steps == 4
    options = parse(["--resume", str(left), "--num_train_epochs", "3"])
    assert options.max_steps is None and options.num_train_epochs == 3


def test_another_precision_stage_and_offload_are_applied(left):
    trained(["--resume", str(left), "--precision", "bf16", "--stage", "3", "--gradient_checkpointing"])
    options = parse(["--resume", str(left)])
    assert (options.precision, options.stage, options.gradient_checkpointing) == ("bf16", 3, True)
    assert {record["step"] for record in read_metrics(left / METRICS) if "loss" in record} == {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lora_alpha": 64}, "--lora_alpha was 16.0 there and is 64.0 here"),
        ({"lora_rank": 4}, "--lora_rank was 8 there and is 4 here"),
        ({"use_rslora": True}, "--use_rslora was False there and is True here"),
        ({"lora_target": "q_proj,v_proj"}, "--lora_target was None there"),
        ({"optim": "lion"}, "--optim was adamw there and is lion here"),
        ({"seed": 7}, "--seed was 42 there and is 7 here"),
        ({"max_samples": 3}, "fingerprint of the tokenised training rows was"),
        ({"model_name_or_path": "OTHER"}, "fingerprint of the base"),
        ({"max_steps": 1}, "2 steps are taken there, and this run is to end after 1"),
    ],
)
def test_what_a_checkpoint_is_of_cannot_be_changed(left, tmp_path, changed, message):
    """With the folder's own options, and without them; and a refused run changes nothing."""
    if "model_name_or_path" in changed:
        other = tiny_llama()
        other.model.layers[1].self_attn.q_proj.weight.data.mul_(1.001)  # as a merged adapter would
        other.save_pretrained(tmp_path / "other")
        changed = {"model_name_or_path": tmp_path / "other"}
    before = {path: path.read_bytes() for path in left.rglob("*") if path.is_file()}
    assert left / "run.lock" not in before
    with pytest.raises(ValueError) as error:
        train_medqa.prepare(parse(["--resume", str(left), *to_flags(changed)]))
    assert message in str(error.value)
    after = {path: path.read_bytes() for path in left.rglob("*") if path.is_file() and path.name != "run.lock"}
    assert after == before


def test_the_checkpoint_says_so_too_where_no_options_lie_beside_it(left, base):
    (left / OPTIONS).unlink()
    argv = first(base, left, resume=left, lora_alpha=64)
    with pytest.raises(ValueError, match=r"--lora_alpha was 16\.0 there and is 64\.0 here"):
        train_medqa.prepare(parse(argv))


def test_another_number_of_ranks_is_told_with_the_command(left, monkeypatch):
    """Of a run of two: its step had twice the rows that one rank has."""
    monkeypatch.setattr(sys, "argv", ["train_medqa.py", "--resume", "a b"])
    whole = zerolite.load

    def load(*given):
        extra = whole(*given)
        extra["position"]["global_batch_rows"] *= 2
        return extra

    monkeypatch.setattr(zerolite, "load", load)
    with pytest.raises(ValueError) as error:
        train_medqa.prepare(parse(["--resume", str(left)]))
    assert "rows of an optimizer step (ranks x batch x accumulation) was 4 there and is 2 here" in str(error.value)
    assert "torchrun --standalone --nproc-per-node 2 train_medqa.py --resume 'a b'" in str(error.value)


def test_prints_tell_bases_apart_by_any_matrix_of_a_layer(base, tmp_path):
    for name in ("q_proj", "o_proj"):
        other = tiny_llama()
        getattr(other.model.layers[0].self_attn, name).weight.data[3, 5] += 1
        other.save_pretrained(tmp_path / name)
    found = {print_of([folder]) for folder in (base, tmp_path / "q_proj", tmp_path / "o_proj")}
    assert len(found) == 3
