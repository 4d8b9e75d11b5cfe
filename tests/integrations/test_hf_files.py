"""Are a sharded trainer's files those of the trainer itself: the hub's layout, the best model, adapters?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import assert_close, assert_same_bits, whole
from peft import LoraConfig, PeftModel
from trainer_runs import Trained, model_of, result_of, train, trainer_of
from transformers import LlamaForCausalLM

OF_STATES = {"optimizer.pt", "scheduler.pt", "zerolite"}  # what a trainer and zerolite resume from


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def best_models(folder: str) -> list[tuple[Trained, Trained]]:
    """The best of four evaluations, rates so high that the last is not it; by itself and by zerolite."""
    results = []
    for name, options in {
        "states": dict(save_total_limit=1),
        "weights alone": dict(save_only_model=True, save_total_limit=2),
    }.items():
        given = dict(
            options, load_best_model_at_end=True, save_strategy="steps", save_steps=1, eval_steps=1, learning_rate=0.1
        )
        expected = train("trainer", Path(folder) / name / "plain", None, **given)
        results.append((expected, train("trainer", Path(folder) / name / "zero", dict(stage=3), **given)))
    return results


def test_the_best_model_is_loaded_and_old_checkpoints_are_removed(ranks, tmp_path):
    for results in ranks(2).run(best_models, str(tmp_path)):
        for expected, actual in results:
            losses = [row["eval_loss"] for row in expected.logs if "eval_loss" in row]
            assert min(losses) < losses[-1], "else the best model is the last"
            assert_close(actual.parameters, expected.parameters, rtol=1e-12, atol=1e-13)
    for name in ("states", "weights alone"):
        plain, ours = tmp_path / name / "plain", tmp_path / name / "zero"
        assert names_in(ours) == names_in(plain)
        for checkpoint in names_in(plain):
            assert names_in(ours / checkpoint) - OF_STATES == names_in(plain / checkpoint) - OF_STATES


def saved(kind: str, stage: int, folder: str, options: dict) -> Trained:
    """A run whose checkpoints and whose model go to one folder; each is written twice."""
    given = dict(options=options, save_strategy="steps", save_steps=4)
    for _ in range(2):
        trainer = trainer_of(kind, Path(folder), dict(stage=stage), **given)
        trainer.train()
        trainer.save_model()
    return result_of(trainer)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_saved_model_is_what_transformers_loads(ranks, tmp_path, stage):
    expected = ranks(2).run(saved, "trainer", stage, str(tmp_path), {})[0].parameters
    for folder in (tmp_path, tmp_path / "checkpoint-4"):
        assert_same_bits(whole(LlamaForCausalLM.from_pretrained(folder, dtype="auto")), expected)
    assert names_in(tmp_path) == {
        "checkpoint-4", "config.json", "generation_config.json", "model.safetensors", "training_args.bin",
    }  # fmt: skip


def test_adapters_that_are_saved_are_what_peft_loads(ranks, tmp_path):
    """With a whole module beside them, which PEFT keeps twice."""
    options = {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["embed_tokens"])}
    trained = ranks(2).run(saved, "sft-lora", 3, str(tmp_path), options)[0].parameters
    for folder in (tmp_path, tmp_path / "checkpoint-4"):
        model = PeftModel.from_pretrained(model_of("sft-lora"), folder)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, trained[name]), name
        assert (folder / "adapter_model.safetensors").stat().st_size < 20_000, "the base is not saved"


def resumed_elsewhere(folder: str) -> list[str]:
    """Errors of resuming from what holds no states."""
    said = []
    for name, zero, given in [("plain", None, {}), ("weights", dict(stage=1), dict(save_only_model=True))]:
        run = Path(folder) / name
        train("trainer", run, zero, save_strategy="steps", save_steps=4, **given)
        with pytest.raises(ValueError) as error:
            train("trainer", run, dict(stage=3), resume=str(run / "checkpoint-4"), max_steps=6)
        said.append(str(error.value))
    return said


def test_a_checkpoint_without_states_is_refused_by_name(ranks, tmp_path):
    for said in ranks(2).run(resumed_elsewhere, str(tmp_path)):
        assert all("holds no folder 'zerolite'" in text and "from_pretrained" in text for text in said)
