"""Folders of diffusers: read into shards with the bits of from_pretrained, and written as save_pretrained does."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from crosses import each
from models import assert_same_tensors
from safetensors.torch import load_file, save_file
from saved import attempt, full

import zerolite

diffusers = pytest.importorskip("diffusers")
from painting_models import CASES, build_painting, output_of  # noqa: E402

RUNS = [
    pytest.param(name, world, stages, in_files, id=f"{name} {world} default")
    for name, world, stages, in_files in each(tuple(CASES), [2, 1], [(0, 3), (1,), (2,), (3,)], [False, True])
]
RUNS += [
    pytest.param(name, world, (0, 1, 2, 3), True, marks=pytest.mark.slow, id=f"{name} {world}")
    for name in CASES
    for world in (1, 2)
]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def opened(folder: Path) -> torch.nn.Module:
    name = json.loads((folder / "config.json").read_text())["_class_name"]
    return getattr(diffusers, name).from_pretrained(folder).eval()


def load_export_load(folder: Path, exports: Path, stages: tuple[int, ...]):
    results = []
    for stage in stages:
        model = zerolite.load_pretrained(folder, stage=stage)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        parameters, output = full(model), output_of(model)
        zerolite.export(model, exports / str(stage))
        again = zerolite.load_pretrained(exports / str(stage), stage=3 - stage)
        assert_same_tensors(full(again), parameters)
        results.append((output, output_of(again), parameters, buffers, model.training))
    return results


@pytest.mark.parametrize("name, world, stages, in_files", RUNS)
def test_a_folder_of_diffusers_loads_and_comes_back(ranks, tmp_path, name, world, stages, in_files):
    """Parameters, buffers and outputs are those of from_pretrained, the export's files and config save_pretrained's."""
    folder = tmp_path / "model"
    build_painting(name).save_pretrained(folder, max_shard_size="10KB" if in_files else "10GB")
    assert (folder / "diffusion_pytorch_model.safetensors.index.json").is_file() == in_files
    twin = opened(folder)
    twin.save_pretrained(tmp_path / "twin")
    expected = output_of(twin)
    for results in ranks(world).run(load_export_load, folder, tmp_path / "exports", stages):
        for output, again, parameters, buffers, training in results:
            assert torch.equal(output, expected) and torch.equal(again, expected) and not training
            assert_same_tensors(parameters, twin.state_dict())
            assert_same_tensors(buffers, dict(twin.named_buffers()))
    for stage in stages:
        export = tmp_path / "exports" / str(stage)
        assert sorted(path.name for path in export.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
        assert_same_tensors(tensors_of(export), tensors_of(tmp_path / "twin"))
        assert (export / "config.json").read_text() == (tmp_path / "twin" / "config.json").read_text()
        assert torch.equal(output_of(opened(export)), expected)


def export_built(folder: Path):
    from zerolite.checkpoint import folder_writer

    original, folder_writer.FILE_BYTES = folder_writer.FILE_BYTES, 8_000
    try:
        zerolite.export(zerolite.shard(build_painting("pixart").bfloat16(), stage=2), folder)
    finally:
        folder_writer.FILE_BYTES = original
    return full(zerolite.load_pretrained(folder, stage=3))


def test_an_export_in_several_files_of_16_bits(ranks, tmp_path):
    """An index that diffusers reads; it, and load_pretrained, give fp32, as from_pretrained does of any folder."""
    results = ranks(2).run(export_built, tmp_path / "model")
    files = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"diffusion_pytorch_model-00001-of-{len(files):05d}.safetensors"
    twin = opened(tmp_path / "model")
    assert_same_tensors(twin.state_dict(), build_painting("pixart").bfloat16().float().state_dict())
    for parameters in results:
        assert_same_tensors(parameters, twin.state_dict())


def load_only(folder: Path):
    return full(zerolite.load_pretrained(folder, stage=3))


def test_old_names_of_attention_are_renamed_as_diffusers_does(ranks, tmp_path):
    """Autoencoders of 2022 say query, key, value and proj_attn."""
    build_painting("vae").save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(path)
    for new, name in old.items():
        tensors = {key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): t for key, t in tensors.items()}
    assert any(".proj_attn." in key for key in tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    for parameters in ranks(2).run(load_only, tmp_path):
        assert_same_tensors(parameters, build_painting("vae").state_dict())


# What is wrong with a folder


def configured(folder: Path, **entries) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def without(folder: Path, part: str) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if part not in name}
    save_file(tensors, path, metadata={"format": "pt"})


def as_pipeline(folder: Path) -> None:
    shutil.copytree(folder, folder / "transformer")
    (folder / "config.json").rename(folder / "model_index.json")


SPOILT = {
    "another class": (lambda folder: configured(folder, _class_name="DDPMScheduler"), "no model class of diffusers"),
    "no class": (lambda folder: configured(folder, _class_name=3), "no model class of diffusers"),
    "other widths": (lambda folder: configured(folder, attention_head_dim=4), "config.json asks for"),
    "more layers": (lambda folder: configured(folder, num_layers=10**7), "num_layers asks for 10,000,000"),
    "another config": (lambda folder: configured(folder, patch_size="x"), "config.json cannot be used"),
    "quantised": (lambda folder: configured(folder, quantization_config={"quant_method": "torchao"}), "is quantised"),
    "a weight less": (lambda folder: without(folder, "0.attn1.to_q.weight"), "holds no weights for transformer_blocks"),
    "a pipeline": (as_pipeline, "is a pipeline of diffusers, and a model is loaded"),
}


def load_spoilt(root: Path) -> list[tuple[str, str]]:
    return [attempt(lambda name=name: zerolite.load_pretrained(root / name, stage=3)) for name in SPOILT]


def test_a_folder_that_holds_no_model_of_diffusers_is_refused(ranks, tmp_path):
    build_painting("dit").save_pretrained(tmp_path / "dit")
    for name, (spoil, _) in SPOILT.items():
        shutil.copytree(tmp_path / "dit", tmp_path / name)
        spoil(tmp_path / name)
    for results in ranks(2).run(load_spoilt, tmp_path):
        for (name, (_, part)), (kind, text) in zip(SPOILT.items(), results, strict=True):
            assert kind == "ValueError" and part in text and str(tmp_path / name) in text, (name, kind, text)


def test_without_diffusers_the_error_says_what_to_install(tmp_path, monkeypatch):
    build_painting("dit").save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install 'zerolite\[diffusion\]'"):
        zerolite.load_pretrained(tmp_path, stage=1)
