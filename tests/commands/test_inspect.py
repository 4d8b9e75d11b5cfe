"""`zerolite inspect`: does it tell what a folder holds, and does it see everything that is broken?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from models import build, joint_batch, part
from peft import LoraConfig, get_peft_model
from resigned import edit_manifest, edit_metadata
from safetensors.torch import load_file, save_file
from saved import rank, world

import zerolite
from zerolite import cli


def save_on_rank(folder: Path, stage: int, offload: str | None, name: str) -> int:
    """Two steps of a LLaMA in bf16, saved; the bytes that the ranks' states take."""
    model = zerolite.shard(build("llama", torch.float32), stage=stage, offload=offload, precision=zerolite.Precision())
    optimizer = zerolite.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(2):
        ids = part(joint_batch("llama", step), rank(), world())["input_ids"]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    extra = {"position": {"step": 2, "seed": 7}, "noise": torch.zeros(3), "words": ["a", "\x1b[31m"]}
    zerolite.save(model, folder / name, optimizer, extra)
    return sum(parameter.numel() for parameter in model.parameters())


CASES = [(1, None), (2, None), (3, None), (2, "cpu"), (3, "cpu")]


@pytest.fixture(scope="module")
def checkpoints(ranks, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    for stage, offload in CASES:
        ranks(2).run(save_on_rank, root, stage, offload, f"{stage}-{offload}")
    return root


@pytest.fixture
def copied(checkpoints, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoints / "3-None", tmp_path / "checkpoint"))


def inspected(capsys, folder: Path, *options: str) -> dict:
    assert cli.main(["inspect", str(folder), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, folder: Path, status: int, *options: str) -> str:
    """The one line that a broken folder is answered with."""
    assert cli.main(["inspect", str(folder), *options]) == status
    out, err = capsys.readouterr()
    assert not out and err.startswith("zerolite inspect: error: ") and err.count("\n") == 1, (out, err)
    return err


@pytest.mark.parametrize("stage, offload", CASES)
def test_a_checkpoint_is_told_as_it_is(checkpoints, capsys, stage, offload):
    """Stage, ranks, step, dtypes, parameters, bytes of each kind and the optimizer, of every stage and of offload."""
    found = inspected(capsys, checkpoints / f"{stage}-{offload}")
    model = build("llama", torch.float32)
    numel = sum(parameter.numel() for parameter in model.parameters())
    assert (found["stage"], found["world_size"], found["step"], found["model"]) == (stage, 2, 2, "LlamaForCausalLM")
    assert (found["dtype"], found["saved_dtype"], found["num_parameters"]) == ("bf16", "fp32", numel)
    assert found["bytes"] == {"parameter": 4 * numel, "exp_avg": 4 * numel, "exp_avg_sq": 4 * numel, "extra": 2 * 12}
    assert found["optimizer"]["class"] == "AdamW" and found["optimizer"]["steps"] == [2]
    assert found["optimizer"]["groups"][0]["weight_decay"] == 0.1 and found["has_config"] and found["holds_frozen"]
    assert found["versions"] == {"zerolite": zerolite.__version__, "torch": torch.__version__}
    assert found["extra"] == {"position": {"step": 2, "seed": 7}, "noise": "tensor extra/0", "words": ["a", "\x1b[31m"]}
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    assert sum(group["num_tensors"] for group in found["tensors"]) == len(shapes)
    assert {tuple(group["shape"]) for group in found["tensors"]} == {tuple(shape) for shape in shapes.values()}


def test_the_text_puts_layers_together_and_holds_no_control_character(checkpoints, capsys):
    assert cli.main(["inspect", str(checkpoints / "3-None")]) == 0
    text = capsys.readouterr().out
    assert "model.layers.*.mlp.up_proj.weight" in text and "SHA-256 of every file" in text and "\x1b" not in text
    assert "AdamW, steps: 2" in text and all(len(line) < 130 for line in text.splitlines())


def test_what_is_altered_is_named(copied, capsys):
    """A bit in a file, a cut file, a missing one, a manifest by another hand: status 1, and the file's name."""
    path = copied / "rank-00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert str(path) in refused(capsys, copied, 1)
    assert inspected(capsys, copied, "--no_hash")["verified"].startswith("sizes and structure")
    path.write_bytes(whole[:-4])
    assert str(path) in refused(capsys, copied, 1) and str(path) in refused(capsys, copied, 1, "--no_hash")
    path.unlink()
    assert str(path) in refused(capsys, copied, 1)
    path.write_bytes(whole)
    manifest = copied / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"stage": 3', '"stage": 1'))
    assert "was altered" in refused(capsys, copied, 1)


@pytest.mark.parametrize("value", [None, 3, "x", [], {"dtypes": 3}, {"dtypes": {"a": []}, "class": 5, "config": 1}])
def test_what_a_stranger_wrote_about_the_model_is_data(copied, capsys, value):
    """Entries beside those that are loaded are shown as far as they are what zerolite writes."""
    edit_manifest(copied, lambda manifest: manifest.update(model=value, versions=value))
    assert inspected(capsys, copied)["saved_dtype"] == "fp32"
    assert cli.main(["inspect", str(copied)]) == 0


def test_values_that_nest_too_deeply_are_one_line(copied, capsys):
    deep = "1"
    for _ in range(900):
        deep = f'{{"list": [{deep}]}}'
    for name in ("rank-00000.safetensors", "rank-00001.safetensors"):
        edit_metadata(copied, name, "extra", lambda value: deep)
    assert cli.main(["inspect", str(copied)]) in (0, 1) and cli.main(["inspect", str(copied), "--json"]) in (0, 1)
    assert capsys.readouterr().err.count("\n") <= 2


def test_a_checkpoint_of_an_older_version_is_told_with_what_it_lacks(copied, capsys):
    edit_manifest(copied, lambda manifest: (manifest.pop("model"), manifest.pop("versions")))
    found = inspected(capsys, copied)
    assert found["dtype"] == "fp32" and not found["has_config"] and found["versions"] == {} and found["model"] is None


def test_a_hugging_face_folder(tmp_path, capsys):
    """Sharded safetensors with their index; what is missing or cut is named."""
    build("llama", torch.bfloat16).save_pretrained(tmp_path / "model", max_shard_size="8KB")
    found = inspected(capsys, tmp_path / "model")
    assert found["kind"] == "Hugging Face model" and found["dtype"] == "bf16" and len(found["files"]) > 1
    assert found["num_parameters"] == sum(parameter.numel() for parameter in build("llama").parameters())
    first = min((tmp_path / "model").glob("*.safetensors"))
    whole = first.read_bytes()
    first.write_bytes(whole[:-2])
    assert str(first) in refused(capsys, tmp_path / "model", 1)
    save_file(dict(list(load_file_of(whole, tmp_path).items())[1:]), first)
    assert str(first) in refused(capsys, tmp_path / "model", 1)
    first.unlink()
    assert str(first) in refused(capsys, tmp_path / "model", 1)
    (tmp_path / "model" / "config.json").write_text("{")
    assert "config.json" in refused(capsys, tmp_path / "model", 1)


def load_file_of(data: bytes, folder: Path) -> dict:
    (folder / "whole").write_bytes(data)
    return load_file(folder / "whole")


def test_an_adapter_folder_as_peft_writes_it(tmp_path, capsys):
    model = get_peft_model(build("llama", torch.float32), LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    found = inspected(capsys, tmp_path)
    numel = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert (found["kind"], found["model"], found["num_parameters"]) == ("adapter", "LORA", numel)
    assert found["settings"]["r"] == 3 and found["settings"]["lora_alpha"] == 5
    assert cli.main(["inspect", str(tmp_path)]) == 0 and "LORA" in capsys.readouterr().out
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    assert "adapter_model.safetensors" in refused(capsys, tmp_path, 1)


def test_a_folder_of_folders_says_which_to_look_at(copied, capsys):
    assert f"look at {copied}" in refused(capsys, copied.parent, 2)
    assert "not there" in refused(capsys, copied / "nowhere", 2) and "a file" in refused(
        capsys, copied / "manifest.json", 2
    )


def test_a_model_of_diffusers_is_told_with_its_files(tmp_path, capsys):
    """Its index and its version are read, and a missing file is named."""
    from painting_models import build_painting

    build_painting("dit").save_pretrained(tmp_path, max_shard_size="40KB")
    told = inspected(capsys, tmp_path)
    assert told["model"] == "DiTTransformer2DModel" and "diffusers" in told["versions"] and len(told["files"]) > 1
    missing = sorted(tmp_path.glob("*.safetensors"))[1]
    missing.unlink()
    assert missing.name in refused(capsys, tmp_path, 1)
