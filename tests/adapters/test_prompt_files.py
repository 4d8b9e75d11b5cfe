"""Virtual tokens written by PEFT are read here, and ours there, with the same logits; what does not fit is named."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from peft_twins import CASES, KINDS, TOKENS, base, batch, difference, of_tokens, ours, peft_twin, right_padded
from safetensors.torch import load_file, save_file

from zerolite.adapters.prompt_files import from_peft, to_peft
from zerolite.adapters.prompts import add_prompt
from zerolite.adapters.state import adapter_of

peft = pytest.importorskip("peft")


def write(folder: Path, config: dict, tensors: dict[str, torch.Tensor]) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def read(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return config, load_file(folder / "adapter_model.safetensors")


def logits_of(model) -> torch.Tensor:
    """Of rows padded on the right, as PEFT counts positions."""
    inputs = right_padded(batch())
    return of_tokens(model(**inputs).logits, inputs["attention_mask"])


def train(model, parameters) -> None:
    optimizer = torch.optim.SGD(list(parameters), lr=0.1)
    for _ in range(2):
        model(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(("family", "case"), CASES)
def test_what_peft_trained_and_wrote_is_opened_here(family, case, tmp_path):
    """A file that PEFT made after training gives its logits here, and is written again with the same tensor."""
    model = base(family)
    twin = peft_twin(model, ours(model, case), case)
    train(twin, (parameter for parameter in twin.parameters() if parameter.requires_grad))
    twin.save_pretrained(tmp_path)
    config, tensors = read(tmp_path)
    opened = copy.deepcopy(model)
    from_peft(opened, "default", config, tensors)
    assert difference(logits_of(opened), logits_of(twin)) <= 1e-6
    assert all(parameter.requires_grad for parameter in opened.prompts.parameters())
    _, again = to_peft(opened, adapter_of(opened, "default"))
    assert list(again) == list(tensors) and torch.equal(again["prompt_embeddings"], tensors["prompt_embeddings"])


@pytest.mark.parametrize(("family", "case"), CASES)
def test_what_was_trained_and_written_here_is_opened_by_peft(family, case, tmp_path):
    """PeftModel.from_pretrained opens our file without a warning, to the same logits, also after training here."""
    model = base(family)
    adapted = ours(model, case)
    train(adapted, adapted.prompts.parameters())
    write(tmp_path, *to_peft(adapted, adapter_of(adapted, "default")))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        opened = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    assert difference(logits_of(opened), logits_of(adapted)) <= 1e-6
    again = copy.deepcopy(model)
    from_peft(again, "reloaded", *read(tmp_path))
    assert torch.equal(logits_of(again), logits_of(opened))


@pytest.mark.parametrize("case", KINDS)
def test_the_configuration_is_the_one_that_peft_writes(case, tmp_path):
    """Every key of PEFT's adapter_config.json is in ours with the same value, but for PEFT's own version."""
    model = base("qwen3")
    adapted = ours(model, case)
    peft_twin(model, adapted, case).save_pretrained(tmp_path)
    theirs, _ = read(tmp_path)
    mine, _ = to_peft(adapted, adapter_of(adapted, "default"))
    theirs.pop("peft_version")
    differing = {key for key in theirs.keys() | mine.keys() if theirs.get(key) != mine.get(key)}
    assert differing <= {"auto_mapping", "base_model_name_or_path"}, {
        k: (theirs.get(k), mine.get(k)) for k in differing
    }
    assert mine.keys() >= theirs.keys()


def test_a_file_holds_what_the_model_computes_from_a_text():
    """The prefix of a text in a file is one row a token: layer by layer, keys and then values."""
    model = base("llama")
    adapted = add_prompt(copy.deepcopy(model), "prefix", 3, text_ids=[4, 5, 6])
    _, tensors = to_peft(adapted, adapter_of(adapted, "default"))
    output = model(torch.tensor([[4, 5, 6]]), use_cache=True)
    layers = (output["cache"] if "cache" in output else output["past_key_values"]).layers
    expected = torch.cat(
        [part[0].transpose(0, 1).flatten(1) for layer in layers for part in (layer.keys, layer.values)], 1
    )
    assert torch.equal(tensors["prompt_embeddings"], expected)


@pytest.mark.parametrize(
    ("case", "key", "value"),
    [
        ("prompt", "modules_to_save", ["lm_head"]),
        ("prompt", "task_type", "SEQ_CLS"),
        ("prompt", "token_dim", 25),
        ("prompt", "num_transformer_submodules", 2),
        ("prompt", "future_option", True),
        ("prefix", "num_layers", 4),
        ("prefix", "num_attention_heads", 4),
        ("p-tuning", "num_layers", 2),
    ],
)
def test_configurations_that_do_not_fit_are_refused_by_name(case, key, value):
    """A key that is unknown, or does not fit the model, is a ValueError with key, value and what is supported."""
    model = base("llama")
    adapted = ours(model, case)
    config, tensors = to_peft(adapted, adapter_of(adapted, "default"))
    with pytest.raises(ValueError, match=f"{key}=") as error:
        from_peft(copy.deepcopy(model), "default", {**config, key: value}, tensors)
    assert repr(value) in str(error.value) and "supported" in str(error.value)


def test_tensors_that_do_not_fit_are_refused_by_name():
    """A missing, foreign or wrongly shaped tensor is a ValueError with the expected and the found shapes."""
    model = base("llama")
    adapted = ours(model, "prefix")
    config, tensors = to_peft(adapted, adapter_of(adapted, "default"))
    tensor = tensors["prompt_embeddings"]
    for wrong in ({}, {"prompt_embeddings": tensor[:-1]}, {"prompt_embeddings": tensor, "more": tensor}):
        with pytest.raises(ValueError, match=rf"\({TOKENS}, {tensor.shape[1]}\)"):
            from_peft(copy.deepcopy(model), "default", config, wrong)
