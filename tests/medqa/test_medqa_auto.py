"""Does --auto place a run as its machine allows, tell why, keep what the user set, and refuse what cannot fit?"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from pathlib import Path

import pytest
from medqa_runs import to_flags
from mutants import replaced

import train_medqa
from zerolite.medqa import auto, claim, room
from zerolite.medqa.arguments import CORPUS, OPTIONS, PLACED, parse, read_config
from zerolite.memory.recommend import RESERVE

ROOMY = 1e15


def arguments(base: Path, output: Path, **options) -> list[str]:
    named = {"model_name_or_path": base, "tokenizer_name_or_path": CORPUS / "tokenizer", "output_dir": output}
    sizes = {"cutoff_len": 64, "max_samples": 8, "max_steps": 2, "save_steps": 1, "eval_steps": 0}
    return to_flags({**named, **sizes, "per_device_train_batch_size": 2, **options})


def with_memory(device: float, argv: list[str], trains: bool) -> tuple[dict, str]:
    """A run on ranks with so many bytes of device memory: (its choice, with the peaks planned, and what it told)."""
    found_by_it, told = [], io.StringIO()

    def recommended(*given, **named):
        found_by_it.append(recommend(*given, **named))
        return found_by_it[-1]

    recommend = auto.zerolite.recommend
    limits = (device, ROOMY, float("inf"), ROOMY)
    with (
        replaced(room, "free_bytes", lambda options, device: limits),
        replaced(auto.zerolite, "recommend", recommended),
        contextlib.redirect_stdout(told),
    ):
        run = train_medqa.prepare(parse(argv))
        assert not trains or train_medqa.train(run) == 0
    claim.release(run.folder)
    found = {name: getattr(run.options, name) for name in PLACED}
    (recommendation,) = found_by_it
    peaks = [candidate.plan.peak_bytes for candidate in recommendation.candidates]
    return {**found, "peak": recommendation.best.plan.peak_bytes, "least": min(peaks)}, told.getvalue()


def test_less_memory_means_another_choice(ranks, base, tmp_path):
    """Two ranks: with room nothing leaves or is recomputed; with what the least takes, what fits is, and is told."""
    (roomy, told), (other, _) = ranks(2).run(with_memory, ROOMY, arguments(base, tmp_path / "roomy", auto=True), False)
    assert roomy == other and (roomy["offload"], roomy["gradient_checkpointing"]) == ("none", False)
    assert "--auto: --stage" in told
    limit = roomy["least"] / (1 - RESERVE) + 2
    (found, told), (other, _) = ranks(2).run(with_memory, limit, arguments(base, tmp_path / "tight", auto=True), True)
    assert found == other and found["peak"] <= (1 - RESERVE) * limit < roomy["peak"]
    assert found["offload"] == "cpu" or found["gradient_checkpointing"]
    assert "faster, but" in told and "GiB a device in" in told
    # The record holds the choice, and a resumed run keeps it, with any memory.
    recorded = read_config(tmp_path / "tight" / OPTIONS)
    assert {name: recorded[name] for name in PLACED} == {name: found[name] for name in PLACED}
    assert recorded["auto"] is False
    resumed = parse(["--resume", str(tmp_path / "tight")])
    assert {name: getattr(resumed, name) for name in PLACED} == {name: found[name] for name in PLACED}
    again = parse(["--resume", str(tmp_path / "tight"), "--auto", "--stage", "1"])
    assert (again.auto, again.stage, again.offload) == (True, 1, None)


def test_a_flag_beside_it_wins_and_is_told(base, tmp_path, capsys):
    given = {"stage": 1, "offload": "cpu", "offload_states": "int8", "gradient_checkpointing": True}
    run = train_medqa.prepare(parse(arguments(base, tmp_path, auto=True, **given)))
    assert {name: getattr(run.options, name) for name in given} == given and not run.options.offload_parameters
    told = capsys.readouterr().out
    assert "set beside it, and kept: --stage 1, --offload cpu, --gradient_checkpointing True" in told


@pytest.mark.parametrize("kind", [{"finetuning_type": "prefix"}, {"finetuning_type": "prompt"}, {"optim": "lion"}, {}])
def test_every_kind_of_run_can_be_placed(base, tmp_path, kind):
    """On one process there is nothing to share: stage 0, unless something must leave."""
    from_scratch = [] if kind else ["--output_dir", str(tmp_path), "--auto", "--max_steps", "1"]
    run = train_medqa.prepare(parse(from_scratch or arguments(base, tmp_path, auto=True, **kind)))
    assert (run.options.stage, run.options.offload, run.options.auto) == (0, "none", False)


def test_what_does_not_fit_is_refused_before_the_model_is_built(base, tmp_path, monkeypatch):
    """With the nearest miss, and what was set beside --auto."""
    monkeypatch.setattr(room, "free_bytes", lambda options, device: (1000.0, ROOMY, float("inf"), ROOMY))
    monkeypatch.setattr(train_medqa.model, "sharded", lambda *given: pytest.fail("built"))
    with pytest.raises(ValueError) as error:
        train_medqa.prepare(parse(arguments(base, tmp_path, auto=True, stage=0)))
    assert "--auto: no configuration fits 9.31e-07 GiB a device" in str(error.value)
    assert "the nearest is full, stage 0" in str(error.value) and "too many" in str(error.value)
    assert str(error.value).endswith("set beside it, and kept: --stage 0)")
    assert not (tmp_path / OPTIONS).exists()


def test_without_it_the_defaults_are_what_they_were():
    options = parse([]).resolved("cpu")
    assert (options.offload, options.offload_parameters, options.gradient_checkpointing) == ("none", False, False)
    assert dataclasses.replace(parse(["--auto"]), auto=False) == parse([])
