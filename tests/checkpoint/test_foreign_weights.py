"""Is a Hugging Face folder that is not plain weights of its own, or not one folder, refused by name on every rank?"""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from models import build
from safetensors.torch import load_file, save_file
from saved import attempt, rank

import zerolite
from zerolite.checkpoint.weight_files import Weights

WEIGHT = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    build("llama", torch.float32).save_pretrained(path)
    return path


def configured(entry: dict):
    """config.json says how another tool quantised the weights."""

    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | entry))

    return spoil


def with_tensors(change):
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def beside(name: str, dtype: torch.dtype = torch.float32):
    return with_tensors(lambda tensors: tensors.update({name: torch.ones(2, dtype=dtype)}))


def cast(dtype: torch.dtype):
    return with_tensors(lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].to(dtype)}))


def renamed(name: str):
    return with_tensors(lambda tensors: tensors.update({name: tensors.pop(WEIGHT).to(torch.int32)}))


def indexed(name: str):
    """An index that leads out of its folder, to whole weights."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        target = folder.parent / "victim.safetensors"
        (folder / "model.safetensors").rename(target)
        said = name.format(target=target)
        index = {"weight_map": dict.fromkeys(tensors, said)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return spoil


def deep(name: str):
    def spoil(folder: Path) -> None:
        (folder / name).write_text("[" * 100_000)
        if name != "config.json":
            (folder / "model.safetensors").unlink()

    return spoil


FOLDERS = {
    "fp8": (configured({"quantization_config": {"quant_method": "fp8"}}), "quantization_config of fp8"),
    "bitsandbytes": (configured({"quantization_config": {"quant_method": "bitsandbytes"}}), "of bitsandbytes"),
    "gptq": (configured({"quantization_config": {"quant_method": "gptq", "bits": 4}}), "of gptq"),
    "awq": (configured({"quantization_config": {"quant_method": "awq"}}), "of awq"),
    "unnamed": (configured({"quantization_config": {"load_in_8bit": True}}), "of an unnamed method"),
    "compressed": (configured({"compression_config": {"quant_method": "sparse"}}), "compression_config of sparse"),
    "float8 weights": (cast(torch.float8_e4m3fn), f"{WEIGHT} in"),
    "int8 weights": (cast(torch.int8), "is of I8 and the model's of torch.float32"),
    "int64 weights": (cast(torch.int64), "is of I64"),
    "scale_inv": (beside(f"{WEIGHT}_scale_inv"), "quantised: it holds"),
    "SCB": (beside("model.layers.0.mlp.up_proj.SCB"), "quantised: it holds"),
    "absmax": (beside(f"{WEIGHT}.absmax"), "quantised: it holds"),
    "quant_state": (beside(f"{WEIGHT}.quant_state.bitsandbytes__nf4", torch.uint8), "quantised: it holds"),
    "qweight": (renamed("model.layers.0.mlp.up_proj.qweight"), "quantised: it holds"),
    "index above": (indexed("../victim.safetensors"), "names '../victim.safetensors'"),
    "absolute index": (indexed("{target}"), "which is no safetensors file of its folder"),
    "index of a config": (indexed("config.json"), "names 'config.json'"),
    "deep index": (deep("model.safetensors.index.json"), "is no index"),
    "deep config": (deep("config.json"), "is no JSON"),
}


def load_spoilt(root: Path, names: list[str]) -> list[tuple[str, str]]:
    return [attempt(lambda name=name: zerolite.load_pretrained(root / name / "model", stage=2)) for name in names]


def test_codes_and_strangers_paths_are_refused_by_name(ranks, folder, tmp_path):
    """A ValueError on every rank: numbers that only a scale turns into weights are not taken for weights."""
    for name, (spoil, _) in FOLDERS.items():
        shutil.copytree(folder, tmp_path / name / "model")
        spoil(tmp_path / name / "model")
    for results in ranks(2).run(load_spoilt, tmp_path, list(FOLDERS)):
        for (name, (_, part)), (kind, text) in zip(FOLDERS.items(), results, strict=True):
            assert kind == "ValueError" and part in text, f"{name}: {kind or 'it loaded'} {text}"


def load_unlike(folder: Path, other: Path, failing: bool) -> tuple[str, str]:
    """Rank 1 has another folder, or cannot read the one that it has opened."""

    def stale(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    original = Weights.read
    if failing and rank() == 1:
        Weights.read = stale
    try:
        return attempt(lambda: zerolite.load_pretrained(other if rank() == 1 else folder, stage=2))
    finally:
        Weights.read = original


def test_a_rank_with_another_folder_or_none_fails_all(ranks, folder, tmp_path):
    """Missing on one rank, of another training, unreadable in the middle: a CheckpointError on both, at once."""
    shutil.copytree(folder, tmp_path / "trained")
    with_tensors(lambda tensors: tensors[WEIGHT].add_(1.0))(tmp_path / "trained")
    for other, failing, part in [
        (tmp_path / "nowhere", False, "rank 1: ValueError"),
        (tmp_path / "trained", False, "ranks see different folders"),
        (folder, True, "rank 1: OSError"),
    ]:
        for kind, text in ranks(2).run(load_unlike, folder, other, failing):
            assert kind == "CheckpointError" and part in text, text


def load_linked(folder: Path) -> tuple[str, str]:
    return attempt(lambda: zerolite.load_pretrained(folder, stage=0))


def test_a_folder_of_links_loads_as_hugging_faces_cache_has_it(ranks, folder, tmp_path):
    """Its snapshots are links to blobs outside of the folder."""
    (tmp_path / "snapshot").mkdir()
    for path in folder.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert ranks(1).run(load_linked, tmp_path / "snapshot") == [("", "")]


def export_under(folder: Path, mask: int) -> set[str]:
    before = os.umask(mask)
    try:
        zerolite.export(zerolite.shard(build("llama", torch.float32), stage=1), folder)
    finally:
        os.umask(before)
    return {oct(path.stat().st_mode & 0o777) for path in folder.iterdir()}


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600)])
def test_exported_weights_have_the_mode_that_the_umask_gives(ranks, tmp_path, mask, mode):
    """As config.json beside them, so that a server of another user reads both or neither."""
    assert ranks(1).run(export_under, tmp_path / "model", mask) == [{oct(mode)}]
