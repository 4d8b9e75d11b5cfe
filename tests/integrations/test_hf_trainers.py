"""Do trainers of transformers and TRL train on shards as on DDP, at every stage, and go on at another one?"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from models import assert_close, assert_same_bits
from trainer_runs import MAX_NORMS, Trained, model_of, result_of, train, trainer_of


def compared(kind: str, stage: int, later_stage: int, folder: str) -> tuple[Trained, Trained, Trained]:
    """By itself; by zerolite, with a checkpoint at half of the steps; from there on at another stage."""
    runs = Path(folder)
    expected = train(kind, runs / "plain", None)
    whole_run = train(kind, runs / "whole", dict(stage=stage), save_strategy="steps", save_steps=2)
    checkpoint = str(runs / "whole" / "checkpoint-2")
    resumed = train(kind, runs / "resumed", dict(stage=later_stage), resume=checkpoint)
    return expected, whole_run, resumed


def assert_trained_alike(actual: Trained, expected: Trained) -> None:
    """Losses, which a trainer logs in fp32, and what was generated are equal; what it logs in fp64 agrees to 1e-12."""
    assert len(actual.logs) == len(expected.logs)
    for row, expected_row in zip(actual.logs, expected.logs, strict=True):
        assert row.keys() == expected_row.keys()
        for name, value in expected_row.items():
            exactly = name not in ("grad_norm", "eval_loss", "rewards/margins")
            assert row[name] == (value if exactly else pytest.approx(value, rel=1e-12, abs=1e-13)), name
    assert_close(actual.parameters, expected.parameters, rtol=1e-12, atol=1e-13)


def check(ranks, world: int, kind: str, stage: int, later_stage: int, folder: Path) -> None:
    for expected, whole_run, resumed in ranks(world).run(compared, kind, stage, later_stage, str(folder)):
        assert [sum(name in row for row in expected.logs) for name in ("loss", "eval_loss")] == [4, 2]
        assert max(row.get("grad_norm", 0) for row in expected.logs) > MAX_NORMS[kind], "clipping is on"
        assert_trained_alike(whole_run, expected)
        assert_trained_alike(resumed, expected)


CASES = [
    ("trainer", 2, 1, 3), ("trainer", 1, 3, 1), ("seq2seq", 2, 3, 2), ("sft", 2, 1, 3), ("sft-lora", 2, 3, 0),
    ("dpo", 2, 0, 3),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "world", "stage", "later_stage"), CASES)
def test_a_trainer_trains_as_by_itself_and_resumes_at_another_stage(ranks, tmp_path, kind, world, stage, later_stage):
    check(ranks, world, kind, stage, later_stage, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAX_NORMS)
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", range(4))
def test_every_trainer_trains_as_by_itself_at_every_stage(ranks, tmp_path, kind, world, stage):
    check(ranks, world, kind, stage, (stage + 2) % 4, tmp_path)


def with_and_without_offload(kind: str, stage: int, folder: str) -> tuple[Trained, Trained]:
    def run(name: str, **zero) -> Trained:
        model = model_of(kind, torch.float32)
        return train(kind, Path(folder) / name, dict(stage=stage, **zero), model=model)

    return run("device"), run("host", offload="cpu")


@pytest.mark.parametrize(("kind", "stage"), [("trainer", 3), ("sft-lora", 1)])
def test_offload_changes_no_bit_of_a_trainer(ranks, tmp_path, kind, stage):
    for on_device, on_host in ranks(2).run(with_and_without_offload, kind, stage, str(tmp_path)):
        assert on_host.logs == on_device.logs
        assert_same_bits(on_host.parameters, on_device.parameters)


def used_in_another_order(folder: str) -> tuple[Trained, Trained]:
    """Trained twice; by zerolite, evaluated before, where a trainer by itself forgets DDP."""
    trainers = []
    for zero in (None, dict(stage=3)):
        trainer = trainer_of("trainer", Path(folder), zero)
        if zero is not None:
            first = trainer.evaluate()["eval_loss"]
            assert trainer.predict(trainer.eval_dataset).metrics["test_loss"] == first
        trainer.train()
        trainer.train()
        trainers.append(trainer)
    return result_of(trainers[0]), result_of(trainers[1])


def test_a_trainer_may_evaluate_first_and_train_twice(ranks, tmp_path):
    for expected, actual in ranks(2).run(used_in_another_order, str(tmp_path)):
        assert_trained_alike(actual, expected)


def with_options(folder: str) -> list[tuple[str, Trained, Trained]]:
    """Options that change what the loop does between two steps."""
    results = []
    for name, given in {
        "recomputed, and every batch reduced": dict(
            gradient_checkpointing=True,
            accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": True}},
        ),
        "not clipped, by epochs": dict(
            max_grad_norm=0.0, max_steps=-1, num_train_epochs=1, per_device_train_batch_size=3
        ),
        "bf16": dict(bf16=True),
    }.items():
        runs = []
        for zero in (None, dict(stage=3)):
            model = model_of("trainer", torch.float32 if name == "bf16" else torch.float64)
            runs.append(train("trainer", Path(folder) / name, zero, model=model, **copy.deepcopy(given)))
        results.append((name, *runs))
    return results


def test_options_of_the_loop_work_on_shards(ranks, tmp_path):
    """Losses are the same bits; bf16 computes in Accelerate's autocast on fp32 parameters."""
    for results in ranks(2).run(with_options, str(tmp_path)):
        for name, expected, actual in results:
            if name != "bf16":
                assert_trained_alike(actual, expected)
                continue
            assert [row.get("loss") for row in actual.logs] == [row.get("loss") for row in expected.logs]
            assert_close(actual.parameters, expected.parameters, rtol=1e-4, atol=1e-5)
