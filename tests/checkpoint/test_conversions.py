"""Folders that transformers converts on load: the same bits into shards, and the same files back, by family."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from converted_models import CASES, answer, build_case
from counted_reads import count_reads
from crosses import each
from models import assert_same_tensors, build
from safetensors.torch import load_file, save_file
from saved import attempt, full, rank
from torch import nn

import zerolite
from zerolite.adapters import add_lora
from zerolite.checkpoint import conversions

# One of each kind of conversion: prefixes, a vision tower, experts joined, experts of two kinds with a transposition,
# split projections, tables that are not saved, buffers made from parameters. The others at night.
COVERING = ("llava", "qwen2-vl", "glm4v", "deepseek-v3", "ernie-vl-moe", "nomic-bert", "marian", "ibert")
RUNS = [
    pytest.param(name, world, (0, 1, 2, 3), marks=pytest.mark.slow, id=f"{name} {world}")
    for name in CASES
    for world in (1, 2)
]
RUNS += [
    pytest.param(name, world, stages, id=f"{name} {world} default")
    for name, world, stages in each(COVERING, [2, 2, 1], [(0, 3), (1,), (2,), (3,)])
]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def opened(folder: Path) -> nn.Module:
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    return getattr(transformers, name).from_pretrained(folder).eval()


def load_export_load(folder: Path, exports: Path, stages: tuple[int, ...]):
    results = []
    for stage in stages:
        model = zerolite.load_pretrained(folder, stage=stage)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        parameters = full(model)
        zerolite.export(model, exports / str(stage))
        again = zerolite.load_pretrained(exports / str(stage), stage=3 - stage)
        assert_same_tensors(full(again), parameters)
        results.append((answer(model), answer(again), parameters, buffers))
    return results


@pytest.mark.parametrize("name, world, stages", RUNS)
def test_a_converted_folder_gives_the_bits_of_from_pretrained_and_comes_back(ranks, tmp_path, name, world, stages):
    """Parameters, buffers and answers; the export is save_pretrained's, and loads at another stage with the bits."""
    build_case(name).save_pretrained(tmp_path / "model")
    twin = opened(tmp_path / "model")
    twin.save_pretrained(tmp_path / "twin")
    expected = answer(twin)
    for results in ranks(world).run(load_export_load, tmp_path / "model", tmp_path / "exports", stages):
        for logits, again, parameters, buffers in results:
            assert torch.equal(logits, expected) and torch.equal(again, expected)
            assert_same_tensors(parameters, twin.state_dict())
            assert_same_tensors(buffers, dict(twin.named_buffers()))
    for stage in stages:
        assert_same_tensors(tensors_of(tmp_path / "exports" / str(stage)), tensors_of(tmp_path / "twin"))
        config = (tmp_path / "exports" / str(stage) / "config.json").read_text()
        assert json.loads(config) == json.loads((tmp_path / "twin" / "config.json").read_text())
    assert torch.equal(answer(opened(tmp_path / "exports" / str(stages[-1]))), expected)


def load_and_export(folder: Path, export: Path):
    zerolite.export(zerolite.load_pretrained(folder, stage=3), export)


@pytest.mark.parametrize("name", ["llava", "mixtral"])
def test_a_folder_with_the_models_own_names_keeps_them(ranks, tmp_path, name):
    """No conversion brought it in, so none is undone when it goes out, as save_pretrained has it."""
    build_case(name).save_pretrained(tmp_path / "model", save_original_format=False)
    opened(tmp_path / "model").save_pretrained(tmp_path / "twin")
    ranks(2).run(load_and_export, tmp_path / "model", tmp_path / "export")
    assert_same_tensors(tensors_of(tmp_path / "export"), tensors_of(tmp_path / "twin"))
    assert tensors_of(tmp_path / "export").keys() == tensors_of(tmp_path / "model").keys()


def load_in_bf16(folder: Path):
    model = zerolite.load_pretrained(folder, stage=3)
    return full(model), {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("name", ["llava", "mixtral", "t5"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_folder_of_16_bits(ranks, tmp_path, name, dtype):
    """With the dtype of each parameter: T5 keeps some in fp32. Without one in config.json it is the first tensor's."""
    (build("t5", dtype) if name == "t5" else build_case(name, dtype)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    for config in (json.loads(path.read_text()), {**json.loads(path.read_text()), "dtype": None}):
        path.write_text(json.dumps(config))
        twin = opened(tmp_path)
        for parameters, buffers in ranks(2).run(load_in_bf16, tmp_path):
            assert_same_tensors(parameters, twin.state_dict())
            assert_same_tensors(buffers, dict(twin.named_buffers()))
    kept = {name for name, tensor in twin.state_dict().items() if tensor.dtype == torch.float32}
    assert bool(kept) == (name == "t5" and dtype == torch.float16)


def export_built(name: str, folder: Path):
    for stage, units in ((0, None), (3, None), (3, nn.Linear)):
        model = zerolite.shard(build_case(name), stage=stage, units=units)
        zerolite.export(model, folder / f"{stage}-{units}")


@pytest.mark.parametrize("name", ["llava", "nomic-bert", "ernie-vl-moe"])
def test_an_export_of_a_built_model_is_what_save_pretrained_writes(ranks, tmp_path, name):
    """Also where Q, K and V, which the files hold as one, are units of their own."""
    build_case(name).save_pretrained(tmp_path / "twin")
    ranks(2).run(export_built, name, tmp_path / "exports")
    for folder in (tmp_path / "exports").iterdir():
        assert_same_tensors(tensors_of(folder), tensors_of(tmp_path / "twin"))


def load_buffers(folder: Path):
    return {name: buffer.clone() for name, buffer in zerolite.load_pretrained(folder, stage=3).named_buffers()}


def test_buffers_made_from_parameters_that_are_in_no_file(ranks, tmp_path):
    """They have the values that the class computes, as for from_pretrained."""
    build_case("ibert").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if not name.endswith("_integer")}
    assert len(tensors) < len(load_file(path))
    save_file(tensors, path, metadata={"format": "pt"})
    for buffers in ranks(2).run(load_buffers, tmp_path):
        assert_same_tensors(buffers, dict(opened(tmp_path).named_buffers()))


# What is read


@pytest.mark.parametrize("name", ["mixtral", "llava", "nomic-bert"])
def test_joined_and_cut_tensors_are_read_by_ranges(ranks, tmp_path, name):
    """Two ranks together read every element once, but for rows that a cut goes through, and no tensor whole."""
    build_case(name).save_pretrained(tmp_path)
    results = ranks(2).run(count_reads, tmp_path)
    assert all(not whole and read <= 0.6 * numel for read, numel, whole in results), results
    assert results[0][1] <= sum(read for read, _, _ in results) <= 1.02 * results[0][1]


def test_a_transposed_tensor_is_read_whole_and_said(ranks, tmp_path):
    """Of ERNIE's routers alone, one at a time."""
    build_case("ernie-vl-moe").save_pretrained(tmp_path)
    for read, numel, whole in ranks(2).run(count_reads, tmp_path):
        assert whole <= {f"model.layers.1.mlp.gate.weight{end}" for end in ("", "_1")} and read <= 1.15 * numel / 2
    assert any(whole for _, _, whole in ranks(2).run(count_reads, tmp_path))


def live_conversions(folder: Path) -> list[int]:
    """Elements of converted tensors that are alive after each conversion."""
    lives = []
    run = conversions.Conversion.run

    class Counted(conversions.WholeConversions):
        def made(self, conversion, weights):
            found = super().made(conversion, weights)
            lives.append(sum(tensor.numel() for _, made in [self.last] for tensor in made.values()))
            return found

    original, conversions.WholeConversions = conversions.WholeConversions, Counted
    original_of, conversions.FileTensor.__torch_function__ = conversions.FileTensor.__torch_function__, None
    try:
        zerolite.load_pretrained(folder, stage=3)
    finally:
        conversions.WholeConversions, conversions.Conversion.run = original, run
        conversions.FileTensor.__torch_function__ = original_of
    return lives


def test_what_is_converted_whole_is_one_parameter_at_a_time(tmp_path):
    """Were no operation known, each conversion's tensors would be dropped before those of the next one."""
    build_case("mixtral").save_pretrained(tmp_path)
    largest = max(parameter.numel() for parameter in build_case("mixtral").parameters())
    lives = live_conversions(tmp_path)
    assert len(lives) == 4 and max(lives) == largest  # two layers of gates and ups, and of downs


# Ties


def load_tied(folder: Path):
    model = zerolite.load_pretrained(folder, stage=3)
    return full(model)


@pytest.mark.parametrize("kind", ["the other name", "equal", "unlike"])
def test_tied_weights_are_those_that_transformers_ties(ranks, tmp_path, kind):
    """Under the other name, under both alike, or under both with other values: then they are two."""
    build("llama-tied", torch.float32).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.flip(0).contiguous() if kind == "unlike" else embedding.clone()
    if kind == "the other name":
        del tensors["model.embed_tokens.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    twin = opened(tmp_path).state_dict()
    assert torch.equal(twin["lm_head.weight"], twin["model.embed_tokens.weight"]) == (kind != "unlike")
    for parameters in ranks(2).run(load_tied, tmp_path):
        assert_same_tensors(parameters, twin)


# What is wrong with a folder


def spoil(folder: Path, what: str) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if what == "an expert without its gate":
        del tensors["model.layers.1.block_sparse_moe.experts.2.w1.weight"]
    elif what == "an expert less":
        tensors = {name: tensor for name, tensor in tensors.items() if "1.block_sparse_moe.experts.3" not in name}
    elif what == "no experts":
        tensors = {name: tensor for name, tensor in tensors.items() if "1.block_sparse_moe.experts" not in name}
    elif what == "a wide expert":
        name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
        tensors[name] = torch.cat([tensors[name]] * 2)
    elif what == "an expert of integers":
        name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
        tensors[name] = tensors[name].int()
    save_file(tensors, path, metadata={"format": "pt"})


def load_or_refuse(folder: Path):
    return attempt(lambda: zerolite.load_pretrained(folder, stage=3))


@pytest.mark.parametrize(
    "what, part",
    [
        ("an expert without its gate", "layers.1.mlp.experts.gate_up_proj cannot be made of"),
        ("an expert less", "config.json asks for (4, "),
        ("no experts", "holds no weights for model.layers.1.mlp.experts."),
        ("a wide expert", "layers.1.mlp.experts.gate_up_proj cannot be made of"),
        ("an expert of integers", "is of I32"),
    ],
)
def test_a_conversion_without_all_of_its_tensors_is_refused(ranks, tmp_path, what, part):
    """A ValueError on every rank that names the folder and what cannot be made."""
    build_case("mixtral").save_pretrained(tmp_path / "model")
    spoil(tmp_path / "model", what)
    for kind, text in ranks(2).run(load_or_refuse, tmp_path / "model"):
        assert kind == "ValueError" and part in text and str(tmp_path / "model") in text, (kind, text)


def test_other_tables_than_those_known_are_named(tmp_path, monkeypatch):
    build_case("llava").save_pretrained(tmp_path)
    monkeypatch.delattr("transformers.core_model_loading.dot_natural_key")
    with pytest.raises(ImportError, match="install transformers 5.17 or newer"):
        zerolite.load_pretrained(tmp_path, stage=1)


def test_a_missing_file_of_several_is_named(ranks, tmp_path):
    build_case("llava").save_pretrained(tmp_path / "model", max_shard_size="8KB")
    shutil.copytree(tmp_path / "model", tmp_path / "whole")
    missing = sorted((tmp_path / "model").glob("*.safetensors"))[1]
    missing.unlink()
    for kind, text in ranks(2).run(load_or_refuse, tmp_path / "model"):
        assert kind == "ValueError" and f"misses {missing.name}" in text
    assert ranks(1).run(load_or_refuse, tmp_path / "whole") == [("", "")] and rank() == 0


def load_adapted(folder: Path):
    torch.manual_seed(0)
    model = zerolite.load_pretrained(folder, stage=3, offload="cpu", adapt=lambda model: add_lora(model, r=2))
    return full(model), answer(model)


@pytest.mark.parametrize("name", ["llava", "qwen2-moe"])
def test_a_converted_base_takes_an_adapter(ranks, tmp_path, name):
    """add_lora before the values are there, with offload: the base has its bits, and answers as without the adapter."""
    build_case(name).save_pretrained(tmp_path)
    twin = opened(tmp_path)
    for parameters, logits in ranks(2).run(load_adapted, tmp_path):
        assert any("lora_A" in key for key in parameters)
        assert_same_tensors(
            {key: tensor for key, tensor in parameters.items() if "lora_" not in key}, twin.state_dict()
        )
        torch.testing.assert_close(logits, answer(twin))
