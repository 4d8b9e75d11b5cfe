"""Is a run that cannot fit refused before its first step, with what would fit, and is the need what is taken?"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from medqa_runs import to_flags

import train_medqa
import zerolite
from zerolite.medqa import resume, room
from zerolite.medqa.arguments import CORPUS, parse

MIB = 2.0**20
BIG = 1e18


def arguments(base: Path, output: Path, **options) -> list[str]:
    named = {"model_name_or_path": base, "tokenizer_name_or_path": CORPUS / "tokenizer", "output_dir": output}
    sizes = {"cutoff_len": 64, "max_samples": 4, "max_steps": 1, "save_steps": 1, "per_device_train_batch_size": 8}
    return to_flags({**named, **sizes, **options})


def lacking(monkeypatch, **free) -> None:
    """Make less free than there is: of device, host, drive and disk."""
    found = {"device": BIG, "host": BIG + 1, "drive": math.inf, "disk": BIG, **free}
    monkeypatch.setattr(room, "free_bytes", lambda options, device: tuple(found.values()))


def test_model_states_that_do_not_fit_are_refused_with_what_would(base, tmp_path, monkeypatch, capsys):
    """Φ = 156,000 or so at 16 bytes."""
    lacking(monkeypatch, device=1.0 * MIB)
    with pytest.raises(ValueError) as error:
        train_medqa.prepare(parse(arguments(base, tmp_path)))
    assert "model states of a rank take 2.3 MiB and 1.0 MiB of the memory of its device are free" in str(error.value)
    assert str(error.value).endswith(
        "this would fit: --offload cpu, or --stage 3 --offload cpu, or --stage 3 --offload cpu --offload_parameters"
    )
    lacking(monkeypatch, device=0.1 * MIB, host=0.1 * MIB + 1)
    with pytest.raises(ValueError, match="no --stage, --offload or LoRA makes it fit"):
        train_medqa.prepare(parse(arguments(base, tmp_path)))
    lacking(monkeypatch, host=1.0 * MIB)
    with pytest.raises(ValueError, match="its share of host memory are free"):
        train_medqa.prepare(parse(arguments(base, tmp_path, offload="cpu")))
    lacking(monkeypatch, drive=1000.0)
    with pytest.raises(ValueError, match="its share of --offload_path are free"):
        train_medqa.prepare(parse(arguments(base, tmp_path, offload="cpu", offload_path=tmp_path)))
    assert "options.yaml" not in {path.name for path in tmp_path.iterdir()}


def test_a_disk_that_is_too_small_is_refused_or_told(base, tmp_path, monkeypatch):
    lacking(monkeypatch, disk=2.0 * MIB)
    with pytest.raises(ValueError, match=r"the result and one checkpoint take 2\.3 MiB, 2\.0 MiB are free there"):
        train_medqa.prepare(parse(arguments(base, tmp_path)))
    train_medqa.prepare(parse(arguments(base, tmp_path, save_steps=2)))  # the result alone
    lacking(monkeypatch, disk=3.0 * MIB)
    options = parse(arguments(base, tmp_path, max_steps=9)).resolved("cpu")
    told = needs(dataclasses.replace(options, stage=2), 9)
    assert "too much for 9 checkpoints of 1.7 MiB, so the disk will be full before the end" in told


def needs(options, num_steps: int) -> str:
    ranks = train_medqa.processes.join()
    config = train_medqa.model.AutoConfig.from_pretrained(options.model_name_or_path)
    return room.check(options, config, None, ranks, num_steps)


@pytest.mark.parametrize("kind", [{}, {"optim": "lion", "precision": "bf16"}, {"finetuning_type": "lora"}])
def test_the_need_is_what_is_taken(base, tmp_path, kind):
    """The disk's but for manifest and headers; the memory's but for padding."""
    run = train_medqa.prepare(parse(arguments(base, tmp_path, **kind)))
    assert train_medqa.train(run) == 0
    numel = [sum(p.numel() for p in run.model.parameters() if p.requires_grad is is_on) for is_on in (True, False)]
    checkpoint, result = room.disk_bytes(run.options, *numel)
    (saved,) = resume.checkpoints(tmp_path)
    for folder, expected in (
        (saved, checkpoint),
        (tmp_path / ("adapter" if kind.get("finetuning_type") else "model"), result),
    ):
        taken = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        assert expected <= taken <= expected + 40_000, folder
    usage = zerolite.measure(run.model, run.optimizer)
    need = room.needed(run.options, *numel, 1)
    gradients = room.GRADIENT_BYTES * numel[0]
    counted = usage.parameters_bytes + usage.optimizer_bytes - usage.padding_bytes
    assert counted == pytest.approx(need.device - gradients, abs=4096)


def test_a_merge_that_cannot_be_is_refused_before_the_model_is_read(base, tmp_path, monkeypatch):
    """Its head is tied to the embedding."""
    monkeypatch.setattr(zerolite, "load_pretrained", lambda *given, **named: pytest.fail("read"))
    lora = {"finetuning_type": "lora", "lora_target": "lm_head,q_proj", "export_merged": True}
    with pytest.raises(ValueError, match=r"lm_head\.weight is tied to another module's"):
        train_medqa.prepare(parse(arguments(base, tmp_path, **lora)))


def test_a_container_has_no_more_memory_than_its_group(tmp_path, monkeypatch):
    free = room.host_bytes()
    (tmp_path / "memory.max").write_text(str(5 * 2**20))
    (tmp_path / "memory.current").write_text(str(4 * 2**20))
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {2**20}\n")
    monkeypatch.setattr(room, "GROUP", tmp_path)
    swap = room.psutil.swap_memory().free
    assert room.host_bytes() == 2 * 2**20 + swap
    (tmp_path / "memory.max").write_text("max\n")
    assert room.host_bytes() == pytest.approx(free, rel=0.5)


def test_positions_and_ids_are_counted_together(base, tmp_path):
    prompt = {"finetuning_type": "prefix", "num_virtual_tokens": 30, "cutoff_len": 240}
    with pytest.raises(ValueError, match="--cutoff_len 240: this model reads at most 226 tokens beside 30 virtual"):
        train_medqa.prepare(parse(arguments(base, tmp_path, **prompt)))
    tokenizer = train_medqa.model.read_tokenizer(CORPUS / "tokenizer")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert max(tokenizer.get_vocab().values()) == 4096
    config = train_medqa.model.AutoConfig.from_pretrained(base)
    train_medqa.model.check_vocabulary(tokenizer, config)  # an added token that no row uses
    example = train_medqa.model.Example(torch.tensor([5, 4096]).numpy(), torch.tensor([5, 4096]).numpy())
    with pytest.raises(ValueError, match=r"rows hold token '\[PAD\]', id 4096, and the model has 4096"):
        train_medqa.model.check_ids([example], tokenizer, config)
    config.vocab_size = 4000
    with pytest.raises(
        ValueError, match="the tokenizer has 4097 pieces, the model only 4000 embeddings, and 96 pieces"
    ):
        train_medqa.model.check_vocabulary(tokenizer, config)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"pad_token_id": 5000}, "Padding_idx must be within"),
        ({"model_type": "vit"}, "Unrecognized configuration class"),
    ],
)
def test_a_config_that_gives_no_language_model_is_named(base, tmp_path, kind, entries, message):
    import json

    folder = tmp_path / "odd"
    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))
    with pytest.raises(ValueError) as error:
        train_medqa.prepare(parse(arguments(folder, tmp_path / "out", finetuning_type=kind)))
    assert "config.json cannot be used" in str(error.value) and message in str(error.value)
    assert len(str(error.value)) < 500
