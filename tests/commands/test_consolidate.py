"""`zerolite consolidate`: is the folder that of `export`, bit for bit, in bounded memory, whole or not there?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from models import Stack, build, llama
from resigned import edit_manifest
from safetensors.torch import load_file
from torch import nn

import zerolite
from zerolite import cli
from zerolite.checkpoint import consolidate as module
from zerolite.checkpoint import folder_writer

HALF_WAY = 1 + 2.0**-8  # between two numbers of bf16


def save_and_export(folder: Path, name: str, stage: int, offload: str | None, dtype: torch.dtype) -> None:
    """The same model as a checkpoint and as an export; many of its masters lie half-way between bf16 numbers."""
    model = Stack() if name == "stack" else build(name, torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[::3] = HALF_WAY * (1 + torch.arange(parameter.view(-1)[::3].numel()) % 5)
    model = zerolite.shard(model, stage=stage, offload=offload, precision=zerolite.Precision(dtype))
    zerolite.save(model, folder / f"{name}-checkpoint")
    zerolite.export(model, folder / f"{name}-export")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same_folder(found: Path, expected: Path) -> None:
    one, two = tensors_of(found), tensors_of(expected)
    assert one.keys() == two.keys()
    for name, tensor in two.items():
        assert one[name].dtype == tensor.dtype and torch.equal(one[name], tensor), name
    for name in ("config.json", "generation_config.json"):
        assert (found / name).exists() == (expected / name).exists()
        if (expected / name).exists():
            assert json.loads((found / name).read_text()) == json.loads((expected / name).read_text())


CASES = [
    ("llama", 1, None, torch.bfloat16),
    ("llama-tied", 3, "cpu", torch.bfloat16),
    ("gpt2", 2, "cpu", torch.float16),
    ("t5", 3, None, torch.float32),
    ("mixtral", 2, None, torch.bfloat16),
    ("qwen-moe", 3, "cpu", torch.bfloat16),
    ("stack", 3, None, torch.bfloat16),
]


@pytest.mark.parametrize("name, stage, offload, dtype", CASES)
def test_it_is_what_export_writes(ranks, tmp_path, capsys, name, stage, offload, dtype):
    """Names, dtypes and bits, of ties half-way too, of tied and converted weights; transformers opens both alike."""
    ranks(2).run(save_and_export, tmp_path, name, stage, offload, dtype)
    out, expected = tmp_path / "out", tmp_path / f"{name}-export"
    assert cli.main(["consolidate", str(tmp_path / f"{name}-checkpoint"), str(out)]) == 0
    assert_same_folder(out, expected)
    if name != "stack":
        (architecture,) = json.loads((out / "config.json").read_text())["architectures"]
        one, two = (getattr(transformers, architecture).from_pretrained(folder) for folder in (out, expected))
        for (key, first), (_, second) in zip(one.state_dict().items(), two.state_dict().items(), strict=True):
            assert torch.equal(first, second), key


@pytest.fixture(scope="module")
def run_folder(ranks, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("run")
    ranks(2).run(save_and_export, root, "llama-tied", 3, None, torch.bfloat16)
    return root


def test_dtype_fp32_writes_the_masters(run_folder, tmp_path, capsys):
    source = run_folder / "llama-tied-checkpoint"
    assert cli.main(["consolidate", str(source), str(tmp_path / "out"), "--dtype", "fp32", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    found = tensors_of(tmp_path / "out")
    assert told["dtype"] == "torch.float32" and told["bytes"] == sum(tensor.nbytes for tensor in found.values())
    for name, tensor in found.items():
        parts = [load_file(path).get(f"parameter/{name}") for path in sorted(source.glob("*.safetensors"))]
        assert torch.equal(tensor.view(-1), torch.cat([part for part in parts if part is not None]))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_the_tokenizer_of_the_run_is_copied(run_folder, tmp_path, capsys):
    """From beside the checkpoint, from the run's model/, or from the folder that its options name."""
    base, here = tmp_path / "base", tmp_path / "run"
    base.mkdir()
    (base / "tokenizer.json").write_text("{}")
    (base / "tokenizer_config.json").write_text("{}")
    shutil.copytree(run_folder / "llama-tied-checkpoint", here / "checkpoint-2")
    (here / "options.yaml").write_text(f"model_name_or_path: {base}\n")
    assert cli.main(["consolidate", str(here / "checkpoint-2"), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "tokenizer_config.json").is_file() and str(base) in capsys.readouterr().out
    shutil.copytree(base, here / "model")
    assert cli.main(["consolidate", str(here / "checkpoint-2"), str(tmp_path / "out2")]) == 0
    assert str(here / "model") in capsys.readouterr().out and (tmp_path / "out2" / "tokenizer.json").is_file()


def test_memory_is_one_file_and_one_parameter(run_folder, tmp_path, monkeypatch, capsys):
    """Counted from what lives while it is written; the export comes in several files, with their index."""
    monkeypatch.setattr(folder_writer, "FILE_BYTES", 3000)
    pending: list[int] = []
    add = folder_writer.FolderWriter.add

    def counted(writer, tensors):
        pending.append(sum(tensor.nbytes for tensor in [*writer.pending.values(), *tensors.values()]))
        add(writer, tensors)

    monkeypatch.setattr(folder_writer.FolderWriter, "add", counted)
    assert cli.main(["consolidate", str(run_folder / "llama-tied-checkpoint"), str(tmp_path / "out")]) == 0
    largest = max(tensor.nbytes for tensor in tensors_of(tmp_path / "out").values())
    assert max(pending) < 3000 + largest and len(list((tmp_path / "out").glob("model-0*"))) > 3
    assert_same_folder(tmp_path / "out", run_folder / "llama-tied-export")


def refused(capsys, status: int, *arguments) -> str:
    assert cli.main(["consolidate", *map(str, arguments)]) == status
    err = capsys.readouterr().err
    assert err.startswith("zerolite consolidate: error: ") and err.count("\n") == 1, err
    return err


def test_a_folder_that_exists_is_not_touched(run_folder, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert "exists" in refused(capsys, 2, run_folder / "llama-tied-checkpoint", tmp_path / "out")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "exists" in refused(capsys, 2, run_folder / "llama-tied-checkpoint", tmp_path / "link")
    assert not any((tmp_path / "out").iterdir())


def test_a_broken_checkpoint_is_named_and_nothing_is_left(run_folder, tmp_path, capsys, monkeypatch):
    """Altered, or a disk that is full half-way: nothing appears, and nothing lies beside."""
    copied = Path(shutil.copytree(run_folder / "llama-tied-checkpoint", tmp_path / "checkpoint"))
    path = copied / "rank-00000.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert str(path) in refused(capsys, 1, copied, tmp_path / "out")
    path.write_bytes(data)

    def full(*arguments):
        raise OSError(28, "No space left on device", "part-1")

    monkeypatch.setattr(folder_writer.safetensors_file, "write_safetensors", full)
    assert "No space left" in refused(capsys, 2, copied, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_what_it_cannot_know_is_asked_for(run_folder, tmp_path, capsys):
    """A checkpoint of an older version needs --config; one of another model is refused by the first difference."""
    copied = Path(shutil.copytree(run_folder / "llama-tied-checkpoint", tmp_path / "checkpoint"))
    edit_manifest(copied, lambda manifest: (manifest.pop("model"), manifest.pop("versions")))
    assert "--config" in refused(capsys, 2, copied, tmp_path / "out")
    arguments = [copied, tmp_path / "out", "--config", run_folder / "llama-tied-export"]
    assert cli.main(["consolidate", *map(str, arguments)]) == 0
    two, found = tensors_of(run_folder / "llama-tied-export"), tensors_of(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in two.items())
    llama(hidden=32).config.save_pretrained(tmp_path / "other")
    err = refused(capsys, 2, copied, tmp_path / "out2", "--config", tmp_path / "other")
    assert "model.embed_tokens.weight is [64, 16] in it and [64, 32]" in err
    edit_manifest(copied, lambda manifest: manifest.update(frozen=False))
    assert "without its frozen parameters" in refused(capsys, 2, copied, tmp_path / "out2")
    assert "no checkpoint" in refused(capsys, 2, run_folder / "llama-tied-export", tmp_path / "out2")
    assert f"name one of {copied}" in refused(capsys, 2, tmp_path, tmp_path / "out2")


@pytest.mark.parametrize(
    "recorded",
    [{"config": {"model_type": "llama", "num_hidden_layers": 10**9}}, {"config": {"model_type": "no such"}}]
    + [{"config": {"auto_map": {"AutoConfig": "evil.Evil"}}}, {"config": {"architectures": ["Trainer"]}}],
)
def test_a_configuration_of_a_stranger_is_refused(run_folder, tmp_path, capsys, recorded):
    """It is data: no code of its folder runs, and no memory is taken for what it claims."""
    copied = Path(shutil.copytree(run_folder / "llama-tied-checkpoint", tmp_path / "checkpoint"))
    edit_manifest(copied, lambda manifest: manifest.update(model=recorded))
    refused(capsys, 2, copied, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layers_stay_together_only_where_weights_are_converted():
    """So memory is bounded by a parameter, and by a layer where one in a file is several in the model."""
    names = ["model.layers.0.a", "model.layers.0.b", "model.layers.1.a", "norm"]
    assert [len(group) for group in module._groups(build("mixtral"), names)] == [2, 1, 1]
    assert [len(group) for group in module._groups(build("llama"), names)] == [1, 1, 1, 1]
    assert [len(group) for group in module._groups(nn.Module(), names)] == [1, 1, 1, 1]


def test_a_tied_parameter_is_written_under_the_name_that_transformers_ties_from():
    model = nn.Module()
    model.all_tied_weights_keys = {"head.weight": "embedding.weight"}
    assert [module._written_name(model, name) for name in ("head.weight", "norm")] == ["embedding.weight", "norm"]
