"""Adapter folders from strangers: one ValueError that names folder and key, soon, and a model that is as it was."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_models import base, draw
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification

import zerolite
from zerolite.adapters import files, patterns
from zerolite.adapters.files import CONFIG, TENSORS, load, save
from zerolite.adapters.lora import add_lora
from zerolite.adapters.prompts import add_prompt
from zerolite.adapters.state import adapter_of

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


@pytest.mark.parametrize("alpha", [1e308, -1e30, 10**400, float("inf"), float("nan")])
def test_a_scale_beyond_fp32_is_refused(folder, alpha):
    rewrite(folder, lora_alpha=alpha, use_dora=True)
    assert "alpha is a finite number of at most 1e+18" in refused(folder)


def test_a_long_value_is_not_repeated(tmp_path):
    save(add_prompt(base("llama", torch.float32), "prompt", 3), tmp_path)
    rewrite(tmp_path, token_dim="a" * 100_000)
    assert "token_dim='aaa" in refused(tmp_path)


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


def fingerprint(model: nn.Module) -> tuple:
    """Names, classes, hooks, bits and what trains: all that loading could have touched."""
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    values = [(key, p.requires_grad, p.detach().clone().numpy().tobytes()) for key, p in model.named_parameters()]
    return values, [type(module) for module in model.modules()], hooks, sorted(vars(model))


def refused(folder: Path, model: nn.Module | None = None) -> str:
    model = base("llama", torch.float32) if model is None else model
    before = fingerprint(model)
    with pytest.raises(ValueError) as caught:
        load(model, folder)
    assert fingerprint(model) == before and str(folder) in str(caught.value) and len(str(caught.value)) < 3000
    return str(caught.value)


# Any value under any key #

ATOMS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 3),
    st.sampled_from([2**31, 2**63, 10**30, 10**400, -(10**400)]),
    st.floats(),
    st.sampled_from(["", "x", "q_proj", "score", "all-linear", ".*", "(", "\0", "a" * 5000, "LORA", "CAUSAL_LM"]),
)
VALUES = st.recursive(
    ATOMS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["", "x", "q_proj", "("]), inner),
    max_leaves=3,
)


@cache
def strange_base(has_head: bool) -> nn.Module:
    if not has_head:
        return base("llama", torch.float32)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**sizes, num_attention_heads=2, pad_token_id=0)).eval()


ADAPTERS = {
    "lora": (False, lambda model: draw(add_lora(model, use_dora=True))),
    "head": (True, lambda model: draw(add_lora(model))),
    "prompt": (False, lambda model: add_prompt(model, "prompt", 3)),
    "prefix": (False, lambda model: add_prompt(model, "prefix", 3)),
}
MORE_KEYS = ["exclude_modules", "layer_replication", "a_key_of_the_future"]


@pytest.fixture(scope="module", params=ADAPTERS)
def written(request, tmp_path_factory) -> tuple[Path, dict, nn.Module]:
    has_head, add = ADAPTERS[request.param]
    folder, model = tmp_path_factory.mktemp("strange") / request.param, copy.deepcopy(strange_base(has_head))
    add(model)
    save(model, folder)
    return folder, json.loads((folder / CONFIG).read_text()), strange_base(has_head)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_value_under_any_key_is_refused_by_name_or_computes(written, data):
    folder, config, untouched = written
    keys = st.sampled_from([*config, *MORE_KEYS])
    changed = data.draw(st.dictionaries(keys, VALUES, min_size=1, max_size=2))
    (folder / CONFIG).write_text(json.dumps(config | changed))
    model, began = copy.deepcopy(untouched), time.process_time()
    before = fingerprint(model)
    try:
        load(model, folder)
    except ValueError as error:
        assert fingerprint(model) == before and str(folder) in str(error) and len(str(error)) < 6000
    else:
        assert model(input_ids=torch.arange(3, 9)[None]).logits.isfinite().all()
    assert time.process_time() - began < 8


# Tensors that are none of an adapter's #

KEY = "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"


def with_header(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Edit the header of a safetensors file, as text, and leave the data."""

    def damage(folder: Path) -> None:
        data = (folder / TENSORS).read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        text = change(header)
        text = (text if isinstance(text, str) else json.dumps(header)).encode()
        (folder / TENSORS).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])

    return damage


def with_tensor(value: torch.Tensor) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        save_file({**load_file(folder / TENSORS), KEY: value}, folder / TENSORS, metadata={"format": "pt"})

    return damage


def torn(at: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = (folder / TENSORS).read_bytes()
        (folder / TENSORS).write_bytes(data[: int(at * len(data))])

    return damage


def huge_configuration(folder: Path) -> None:
    os.truncate(folder / CONFIG, 20 << 30)  # sparse: it claims 20 GB and has a few KB


def no_file(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)  # reading it would wait for ever

    return damage


SHAPE = (8, 8)
DAMAGES = {
    "float8": (with_tensor(torch.ones(SHAPE).to(torch.float8_e4m3fn)), f"{KEY} of {TENSORS} is of dtype F8_E4M3"),
    "complex": (with_tensor(torch.ones(SHAPE, dtype=torch.complex64)), f"{KEY} of {TENSORS} is of dtype C64"),
    "booleans": (with_tensor(torch.ones(SHAPE, dtype=torch.bool)), "is of dtype BOOL"),
    "not a number": (with_tensor(torch.full(SHAPE, float("nan"))), f"{KEY} of"),
    "infinite": (with_tensor(torch.full(SHAPE, float("inf"))), "holds NaN or Inf"),
    "a scalar": (with_tensor(torch.tensor(1.0)), f"{KEY} of shape () instead of {SHAPE}"),
    "empty": (with_tensor(torch.ones(0, 8)), f"{KEY} of shape (0, 8)"),
    "transposed axes": (with_tensor(torch.ones(8, 8, 1)), f"{KEY} of shape (8, 8, 1)"),
    "an adapter's name in the key": (
        with_header(lambda header: json.dumps(header).replace(KEY, KEY.replace("lora_B", "lora_B.default"))),
        f"no {KEY}",
    ),
    "a file of no tensors": (lambda folder: save_file({}, folder / TENSORS), "no base_model"),
    "torn in the data": (torn(0.7), "truncated or no safetensors file"),
    "torn in the header": (torn(0.01), "truncated or no safetensors file"),
    "a header that is no object": (with_header(lambda header: "[]"), "truncated or no safetensors file"),
    "offsets beyond the file": (
        with_header(lambda header: header[KEY].update(data_offsets=[0, 1 << 50])),
        "truncated or no safetensors file",
    ),
    "overlapping offsets": (
        with_header(lambda header: header[KEY].update(data_offsets=[4, 260])),
        "truncated or no safetensors file",
    ),
    "a shape of 2^62": (with_header(lambda header: header[KEY].update(shape=[1 << 62])), "truncated or no safetensors"),
    "a huge configuration": (huge_configuration, "21,474,836,480 bytes"),
    "a pipe for a configuration": (no_file(CONFIG), f"holds no {CONFIG}"),
    "a pipe for tensors": (no_file(TENSORS), f"holds no {TENSORS}"),
}


@pytest.fixture
def float_folder(tmp_path) -> Path:
    save(draw(add_lora(base("llama", torch.float32))), tmp_path / "lora")
    return tmp_path / "lora"


@pytest.mark.parametrize("what", DAMAGES)
def test_strange_tensors_and_files_are_refused_by_name(float_folder, what):
    damage, text = DAMAGES[what]
    damage(float_folder)
    assert text in refused(float_folder)


def test_what_cannot_be_mapped_into_memory_is_refused_by_name(float_folder, monkeypatch):
    def safe_open(*args, **kwargs):
        raise MemoryError("Cannot allocate memory")

    monkeypatch.setattr(files, "safe_open", safe_open)
    assert f"{TENSORS} cannot be opened" in refused(float_folder)


def test_a_head_of_another_size_or_none_is_named(tmp_path):
    """The file of a classifier with three labels, on one of two; and one whose head was left out."""
    three = copy.deepcopy(strange_base(True))
    three.score = nn.Linear(16, 3, bias=False)
    save(add_lora(three), tmp_path)
    two = copy.deepcopy(strange_base(True))
    assert "base_model.model.score.weight of shape (3, 16) instead of (2, 16)" in refused(tmp_path, two)
    tensors = load_file(tmp_path / TENSORS)
    del tensors["base_model.model.score.weight"]
    save_file(tensors, tmp_path / TENSORS, metadata={"format": "pt"})
    assert "no base_model.model.score.weight" in refused(tmp_path, two)


def test_a_sharded_adapter_is_as_it_was_after_a_strange_folder(float_folder):
    DAMAGES["not a number"][0](float_folder)
    model = zerolite.shard(draw(add_lora(base("llama", torch.float32))), 0)
    before = {key: p.detach().clone() for key, p in adapter_of(model, None).parameters.items()}
    with pytest.raises(zerolite.ZeroliteError, match=r"ValueError: .*holds NaN or Inf"):
        load(model, float_folder)
    assert all(torch.equal(p, before[key]) for key, p in adapter_of(model, None).parameters.items())
