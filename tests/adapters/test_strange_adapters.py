"""Adapter folders from strangers: one ValueError that names the file, soon, whatever stands in them."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

import pytest
import torch
from lora_models import base
from safetensors.torch import load_file, save_file

from zerolite.adapters import files, patterns
from zerolite.adapters.files import CONFIG, TENSORS, load, save
from zerolite.adapters.lora import add_lora
from zerolite.adapters.prompts import add_prompt

EVIL = "(a*)*(a|aa)+$|((?:[a-z0-9_.]+)+)+!"


@pytest.fixture
def folder(tmp_path) -> Path:
    model = base("llama")
    add_lora(model)
    save(model, tmp_path / "lora")
    return tmp_path / "lora"


def rewrite(folder: Path, **entries) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@pytest.mark.parametrize(
    "entries",
    [
        {"target_modules": EVIL},
        {"rank_pattern": {EVIL: 4}},
        {"layers_pattern": [EVIL], "layers_to_transform": [0]},
        {"layers_pattern": ["("], "layers_to_transform": [0]},
        {"target_modules": "(" * 20000},
        {"alpha_pattern": {"[": 4}},
    ],
    ids=str,
)
def test_patterns_are_matched_in_bounded_time(folder, entries):
    rewrite(folder, **entries)
    began = time.process_time()
    with contextlib.suppress(ValueError):  # some that stop `re` are quick here, and mean what they mean in PEFT
        load(base("llama"), folder)
    assert time.process_time() - began < 8


@pytest.mark.parametrize("how", [patterns.fullmatch, patterns.match])
def test_a_pattern_that_takes_too_long_is_named(how):
    with pytest.raises(ValueError, match=r"takes more than .* write it without repetitions inside repetitions"):
        how(r"(?:(x+)+\1)+!", "x" * 40)
    with pytest.raises(ValueError, match="no regular expression"):
        how("(", "x")


@pytest.mark.parametrize("tokens", [None, "9", 0, -3, True, 2.0])
def test_a_prompt_without_a_number_of_tokens_is_refused(tmp_path, tokens):
    model = base("llama")
    add_prompt(model, kind="prompt", tokens=4)
    save(model, tmp_path / "prompt")
    rewrite(tmp_path / "prompt", num_virtual_tokens=tokens)
    with pytest.raises(ValueError, match="num_virtual_tokens"):
        load(base("llama"), tmp_path / "prompt")


def test_deep_nesting_is_no_json(folder):
    (folder / CONFIG).write_text("[" * 100_000)
    with pytest.raises(ValueError, match="adapter_config.json is no JSON"):
        load(base("llama"), folder)


def test_tensors_without_a_place_are_not_read(folder, monkeypatch):
    """The header tells names and shapes, so the gigabytes behind it cost nothing."""
    tensors = load_file(folder / TENSORS)
    save_file({**tensors, "base_model.model.other": torch.zeros(8)}, folder / TENSORS, metadata={"format": "pt"})
    monkeypatch.setattr(files, "_read_tensors", lambda folder: pytest.fail("values were read"))
    with pytest.raises(ValueError, match="base_model.model.other, which has no place"):
        load(base("llama"), folder)
