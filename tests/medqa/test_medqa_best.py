"""What follows from the evaluations of a run: when it ends, what its result is, which checkpoints stay."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from medqa_runs import tiny_llama, to_flags
from safetensors.torch import load_file

import train_medqa
import zerolite
from zerolite.medqa import answers, best, claim, divergence, resume
from zerolite.medqa.arguments import CORPUS, Options, parse
from zerolite.medqa.loss import ALL
from zerolite.medqa.processes import Processes, join
from zerolite.medqa.progress import METRICS, read_metrics


def arguments(base: Path, output: Path, **options) -> list[str]:
    named = {"model_name_or_path": base, "tokenizer_name_or_path": CORPUS / "tokenizer", "output_dir": output}
    sizes = {"cutoff_len": 32, "max_samples": 4, "max_steps": 8, "logging_steps": 1, "eval_steps": 1, "save_steps": 1}
    return to_flags({**named, **sizes, "learning_rate": 1e-2, **options})


@pytest.fixture
def scripted(monkeypatch):
    """The validation loss of each step, in place of what the model says; step 0 has the lowest of all."""

    def script(*losses: float) -> None:
        def of_run(run: train_medqa.Run, progress, signals) -> None:
            monkeypatch.setattr(
                train_medqa, "validation_losses", lambda *_: {ALL: [1.0, *losses][run.position.step], "en": 5.0}
            )
            whole(run, progress, signals)

        monkeypatch.setattr(train_medqa, "validate", of_run)

    whole = train_medqa.validate
    monkeypatch.setattr(answers, "answer", lambda *_: None)  # of other tests
    return script


def run(argv: list[str]) -> int:
    return train_medqa.train(train_medqa.prepare(parse(argv)))


def exported(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model" / "model.safetensors")


def parameters(base: Path, checkpoint: Path) -> dict[str, torch.Tensor]:
    model = zerolite.shard(tiny_llama(), stage=1)
    zerolite.load(model, checkpoint)
    return {name: value.detach() for name, value in model.named_parameters()}


def evaluated(output: Path) -> list[int]:
    return [record["step"] for record in read_metrics(output / METRICS) if "validation_loss" in record]


def test_a_run_without_improvement_ends_early_with_its_best_model_and_says_so(base, tmp_path, scripted, capsys):
    scripted(4.0, 3.0, 3.0, 3.5, 2.0, 2.0, 2.0, 2.0)
    keep = {"save_total_limit": 2, "load_best_model_at_end": True, "early_stopping_patience": 2}
    assert run(arguments(base, tmp_path, **keep)) == 0
    assert evaluated(tmp_path) == [0, 1, 2, 3, 4]
    assert [path.name for path in resume.checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4"]
    assert json.loads((tmp_path / best.BEST).read_text()) == {
        "step": 2,
        "validation_loss": 3.0,
        "checkpoint": "checkpoint-2",
    }
    expected = parameters(base, tmp_path / "checkpoint-2")
    assert all(torch.equal(value, expected[name]) for name, value in exported(tmp_path).items())
    report = (tmp_path / "report.md").read_text()
    assert (
        "Ended at step 4 of 8: 2 evaluations in a row did not improve" in report and report in capsys.readouterr().out
    )
    assert "| after | 2 | 3.0000 |" in report and "The result is the model of step 2." in report


def test_the_last_model_is_the_result_where_it_is_the_best_or_nothing_else_was_asked_for(base, tmp_path, scripted):
    scripted(4.0, 3.0, 2.0)
    assert run(arguments(base, tmp_path / "a", max_steps=3, save_steps=2, load_best_model_at_end=True)) == 0
    assert [path.name for path in resume.checkpoints(tmp_path / "a")] == ["checkpoint-1", "checkpoint-2"]
    assert json.loads((tmp_path / "a" / best.BEST).read_text())["checkpoint"] is None
    scripted(4.0, 5.0, 6.0)
    assert run(arguments(base, tmp_path / "b", max_steps=3, early_stopping_patience=2, save_steps=3)) == 0
    first, second = exported(tmp_path / "a"), exported(tmp_path / "b")
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert evaluated(tmp_path / "b") == [0, 1, 2, 3]


def test_a_run_that_was_stopped_ends_where_it_would_have_ended(base, tmp_path, scripted, monkeypatch):
    """Also where it goes on between two evaluations, which has it evaluate once more."""
    scripted(9.0, 3.0, 9.0, 4.0, 9.0, 5.0, 9.0, 1.0)
    argv = arguments(base, tmp_path, eval_steps=2, save_steps=8, early_stopping_patience=2, load_best_model_at_end=True)
    add = divergence.Divergence.add

    def add_and_stop(self, step: int, optimizer) -> None:
        add(self, step, optimizer)
        if step == 5:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(divergence.Divergence, "add", add_and_stop)
        assert run(argv) == 128 + signal.SIGTERM
    assert run([*argv, "--resume", str(tmp_path)]) == 0
    assert evaluated(tmp_path)[-2:] == [5, 6] and "| after | 2 |" in (tmp_path / "report.md").read_text()


def resumed_losses(folder: Path, records: list[dict]) -> dict[int, float]:
    ranks = join()
    watched = best.Best(Options(eval_steps=2), folder, 9, ranks)
    watched.resume(records if ranks.rank == 0 else [])  # metrics.jsonl is rank 0's
    return watched.losses


def test_ranks_decide_by_the_same_evaluations(ranks, tmp_path):
    records = [{"step": 0, "validation_loss": 1.0}, {"step": 3, "validation_loss": 1.5}, {"step": 4, "loss": 2.0}]
    records += [{"step": 4, "validation_loss": 2.5}, {"step": 8, "validation_loss": None}]
    assert ranks(2).run(resumed_losses, tmp_path, records) == [{4: 2.5}] * 2
    assert ranks(2).run(resumed_losses, tmp_path, []) == [{}] * 2


def with_checkpoints(folder: Path, *steps: int, **options) -> best.Best:
    for step in steps:
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        (folder / f"checkpoint-{step}" / "manifest.json").write_text("{}")
    return best.Best(Options(eval_steps=1, **options), folder, 99, Processes(0, 1, torch.device("cpu")))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "checkpoint" in path.name)


def test_the_newest_and_the_best_checkpoint_are_never_removed(tmp_path):
    watched = with_checkpoints(tmp_path, 2, 4, 6, 8, save_total_limit=1)
    watched.losses = {3: 0.5, 4: 1.0, 6: 2.0}
    watched.remove_oldest(tmp_path / "checkpoint-6")  # 8 is of an earlier run that went on further
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-6"]
    everything = with_checkpoints(tmp_path / "all", 1, 2, 3)
    everything.remove_oldest(tmp_path / "all" / "checkpoint-3")
    assert len(names(tmp_path / "all")) == 3


def test_a_kill_while_a_checkpoint_is_removed_leaves_complete_ones_only(tmp_path, monkeypatch):
    watched = with_checkpoints(tmp_path, 2, 4, save_total_limit=1)

    def killed(path, **_):
        os.remove(Path(path) / "manifest.json")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            watched.remove_oldest(tmp_path / "checkpoint-4")
    assert names(tmp_path) == [".checkpoint-2.tmp-removed", "checkpoint-4"]
    claim.claim_output(Options(output_dir=str(tmp_path), resume=str(tmp_path)))
    claim.release(tmp_path)
    assert names(tmp_path) == ["checkpoint-4"]


def test_a_best_checkpoint_that_is_damaged_is_told_and_the_last_model_stays(base, tmp_path, scripted, capsys):
    scripted(1.0, 3.0)
    watched = best.Best.load

    def damage_and_load(self, model, step):
        (self.folder / "checkpoint-1" / "rank-00000.safetensors").write_bytes(b"")
        return watched(self, model, step)

    best.Best.load = damage_and_load
    try:
        assert run(arguments(base, tmp_path, max_steps=2, load_best_model_at_end=True)) == 0
    finally:
        best.Best.load = watched
    assert "the best checkpoint" in capsys.readouterr().out
    expected = parameters(base, tmp_path / "checkpoint-2")
    assert all(torch.equal(value, expected[name]) for name, value in exported(tmp_path).items())


def test_options_that_need_evaluations_are_refused_without_them():
    for argv, message in [
        (["--early_stopping_patience", "2", "--eval_steps", "0"], "--early_stopping_patience chooses by validation"),
        (["--load_best_model_at_end", "--eval_steps", "0"], "--load_best_model_at_end chooses by validation losses"),
        (["--early_stopping_patience", "2", "--train_file", "a"], "expected --validation_file or --val_size"),
        (["--load_best_model_at_end", "--no-export"], "writes the best model as the result: expected --export"),
        (["--save_total_limit", "0"], "--save_total_limit"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse(argv)
