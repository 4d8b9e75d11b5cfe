"""Hugging Face folders: read by slices into shards, written whole, and the same model on both ways."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from counted_reads import count_reads
from models import FACTORIES, Stack, assert_same_bits, build, drawn, llama, whole
from paths import SHARED
from safetensors.torch import load_file, save_file
from saved import attempt, full, rank, tree
from torch import Tensor, nn

from zerolite.shards.states import ParameterState

STAGES = (0, 1, 2, 3)
FAMILIES = [name for name in FACTORIES if name != "stack"]
STORIES = SHARED / "models" / "stories260K-hf"


def inputs_of(model: nn.Module) -> dict[str, Tensor]:
    ids = torch.arange(3, 27).view(2, 12)
    return {"input_ids": ids, **({"decoder_input_ids": ids.flip(0)} if model.config.is_encoder_decoder else {})}


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    return model(**inputs_of(model), use_cache=False).logits.clone()


def opened(folder: Path) -> nn.Module:
    """The model as transformers opens it."""
    import transformers

    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    return eager(getattr(transformers, name).from_pretrained(folder).eval())


def eager(model: nn.Module) -> nn.Module:
    """Experts one by one: the widths here are too small for the kernel that takes all at once."""
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """One folder a family, as save_pretrained writes it; two of LLaMA in bf16 and in several files."""
    root = tmp_path_factory.mktemp("models")
    for name in FAMILIES:
        build(name, torch.float32).save_pretrained(root / name)
    build("llama", torch.bfloat16).save_pretrained(root / "llama-bf16")
    build("gpt2", torch.float32).save_pretrained(root / "gpt2-files", max_shard_size="10KB")
    build("llama-tied", torch.float32).save_pretrained(root / "llama-tied-files", max_shard_size="8KB")
    return root


# load


def load_at_every_stage(folder: Path):
    import zerolite

    results = []
    for stage in STAGES:
        model = eager(zerolite.load_pretrained(folder, stage=stage))
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        results.append((logits_of(model), full(model), buffers, model.training, str(model.config.dtype)))
    return results


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", [*FAMILIES, "llama-bf16", "gpt2-files", "llama-tied-files"])
def test_a_loaded_model_is_that_of_from_pretrained_bit_for_bit(ranks, folders, name, world):
    """Logits, parameters, dtype, rotary caches and config are those that transformers loads, at every stage."""
    twin = opened(folders / name)
    assert len(list((folders / name).glob("*.safetensors"))) > 1 or "files" not in name
    for results in ranks(world).run(load_at_every_stage, folders / name):
        for logits, parameters, buffers, training, dtype in results:
            assert torch.equal(logits, logits_of(twin)) and logits.dtype == twin.dtype
            assert_same_bits({key: value for key, value in parameters.items() if key in whole(twin)}, whole(twin))
            assert_same_bits(buffers, dict(twin.named_buffers()))
            assert not training and dtype == str(twin.config.dtype)


def load_or_refuse(folder: Path):
    import zerolite

    dist.barrier()  # a rank that is refused at once must not leave while the other one still joins the group
    return attempt(lambda: zerolite.load_pretrained(folder, stage=3))


def load_and_tell(folder: Path, stage: int):
    import zerolite

    model = zerolite.load_pretrained(folder, stage=stage)
    return logits_of(model), model.generation_config.max_new_tokens


@pytest.mark.parametrize("stage", [0, 3])
def test_names_without_the_base_models_prefix(ranks, folders, tmp_path, stage):
    """GPT-2's own files name `wte.weight`, not `transformer.wte.weight`; a generation config is taken."""
    shutil.copytree(folders / "gpt2", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    bare = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    save_file(bare, path, metadata={"format": "pt"})
    (tmp_path / "model" / "generation_config.json").write_text('{"max_new_tokens": 17}')
    for logits, length in ranks(2).run(load_and_tell, tmp_path / "model", stage):
        assert torch.equal(logits, logits_of(opened(folders / "gpt2"))) and length == 17


def load_with_precision(folder: Path, stage: int):
    import zerolite

    precision = zerolite.Precision(torch.bfloat16)
    model = zerolite.load_pretrained(folder, stage=stage, precision=precision)
    masters = [bucket.shard.master for unit in model._zerolite.units for bucket in unit.buckets]
    sharded = zerolite.shard(opened(folder), stage=stage, precision=precision)
    others = [bucket.shard.master for unit in sharded._zerolite.units for bucket in unit.buckets]
    assert all(torch.equal(mine, other) for mine, other in zip(masters, others, strict=True))
    return full(model), full(sharded)


@pytest.mark.parametrize("stage", [0, 3])
def test_masters_keep_the_bits_of_the_files(ranks, folders, stage):
    """fp32 files in bf16 training: parameters and fp32 masters are those of a model built whole and sharded."""
    for loaded, sharded in ranks(2).run(load_with_precision, folders / "llama", stage):
        assert_same_bits(loaded, sharded)
        assert loaded["lm_head.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_reads_its_own_slices_only(ranks, tmp_path, stage):
    """Each of three ranks reads a third of the elements, within a row a cut, and together they read every one."""
    drawn(lambda: llama(hidden=64)).save_pretrained(tmp_path)
    results = ranks(3).run(count_reads, tmp_path, stage)
    numel = results[0][1]
    assert all(not whole and read <= 1.1 * numel / 3 for read, _, whole in results), results
    assert numel <= sum(read for read, _, _ in results) <= 1.02 * numel


# load: what is wrong with a folder


def spoil(folder: Path, what: str) -> Path:
    config = folder / "config.json"
    if what == "no folder":
        return folder / "nowhere"
    if what == "a file":
        return config
    if what == "no config":
        config.unlink()
    elif what == "no weights":
        (folder / "model.safetensors").unlink()
    elif what == "only a pickle":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif what == "missing file":
        sorted(folder.glob("*.safetensors"))[1].unlink()
    elif what == "bad index":
        (folder / "model.safetensors.index.json").write_text('{"weight_map": 3')
    elif what == "index without a map":
        (folder / "model.safetensors.index.json").write_text("[]")
    elif what == "truncated":
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    elif what == "other shapes":
        config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": 65}))
    elif what == "other names":
        config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": 3}))
    return folder


@pytest.mark.parametrize(
    "what, model, part",
    [
        ("no folder", "llama", "is not a folder"),
        ("a file", "llama", "is not a folder"),
        ("no config", "llama", "holds no config.json"),
        ("no weights", "llama", "holds no safetensors weights"),
        ("only a pickle", "llama", "convert its pytorch_model.bin"),
        ("missing file", "gpt2-files", "misses model-00002-of"),
        ("bad index", "gpt2-files", "is no index"),
        ("index without a map", "gpt2-files", "is no index"),
        ("truncated", "llama", "model.safetensors is truncated"),
        ("other shapes", "llama", "has shape (64, 16), config.json asks for (65, 16)"),
        ("other names", "llama", "holds no weights for model.layers.2."),
    ],
)
def test_a_folder_that_holds_no_model_is_refused(ranks, folders, tmp_path, what, model, part):
    """What is wrong with the folder is a ValueError that names it, on every rank."""
    shutil.copytree(folders / model, tmp_path / "model")
    folder = spoil(tmp_path / "model", what)
    for kind, text in ranks(2).run(load_or_refuse, folder):
        assert kind == "ValueError" and part in text and str(folder) in text, (kind, text)


def test_weights_without_a_place_are_named(ranks, folders, tmp_path):
    """Tensors that the model has no parameter for are a warning with their names."""
    shutil.copytree(folders / "llama", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    save_file({**load_file(path), "model.layers.7.stray": torch.ones(2)}, path, metadata={"format": "pt"})
    (warned,) = ranks(1).run(warnings_of_load, tmp_path / "model")
    assert any("model.layers.7.stray" in text for text in warned)
    (warned,) = ranks(1).run(warnings_of_load, folders / "llama")
    assert not any("without a place" in text for text in warned)


def warnings_of_load(folder: Path) -> list[str]:
    import warnings

    import zerolite

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        zerolite.load_pretrained(folder, stage=1)
    return [str(warning.message) for warning in caught]


# the real one


def tell_a_story(folder: Path):
    import zerolite

    results = []
    for stage in STAGES:
        model = zerolite.load_pretrained(folder, stage=stage)
        ids = model.generate(torch.tensor([[1]]), max_new_tokens=256, do_sample=False)
        results.append((logits_of(model), ids))
    return results


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"{STORIES.name} is not here: it comes with the project's shared data")
@pytest.mark.parametrize("world", [1, 2])
def test_a_trained_model_tells_its_known_story(ranks, world):
    """stories260K at every stage: logits of from_pretrained bit for bit, and the published greedy text."""
    from transformers import AutoTokenizer

    twin, tokenizer = opened(STORIES), AutoTokenizer.from_pretrained(STORIES)
    known = (STORIES.parent / "SOURCES.md").read_text().split("Known answer")[1].split("\n    ")[1:]
    for results in ranks(world).run(tell_a_story, STORIES):
        for logits, ids in results:
            assert torch.equal(logits, logits_of(twin))
            text = tokenizer.decode(ids[0], skip_special_tokens=True)
            assert text.split() == "\n".join(known).split()


# export


def export_every_stage(name: str, folder: Path, dtype: torch.dtype):
    import zerolite

    for stage in STAGES:
        model = zerolite.shard(build(name, dtype), stage=stage).eval()
        model.generation_config.max_new_tokens = 17
        if rank() == 0 and stage == 3:  # another model and a tokenizer were here
            (folder / "3").mkdir(parents=True)
            (folder / "3" / "tokenizer.json").write_text("{}")
            for number in (1, 2):
                (folder / "3" / f"model-0000{number}-of-00002.safetensors").write_text("old")
            (folder / "3" / "model.safetensors.index.json").write_text("old")
        before = full(model)
        zerolite.export(model, folder / str(stage))
        assert_same_bits(full(model), before)
        logits = logits_of(model)  # it still runs, from shards
    return logits


@pytest.mark.parametrize("name, dtype", [*((name, torch.float32) for name in FAMILIES), ("llama", torch.bfloat16)])
def test_an_export_is_what_save_pretrained_writes(ranks, tmp_path, name, dtype):
    """Names, tensors, dtype and configs are those of save_pretrained, tied weights once and experts apart; it opens."""
    twin = build(name, dtype).eval()
    twin.generation_config.max_new_tokens = 17
    twin.save_pretrained(tmp_path / "twin")
    for logits in ranks(2).run(export_every_stage, name, tmp_path / "zerolite", dtype):
        assert torch.equal(logits, logits_of(twin))
    for stage in STAGES:
        folder = tmp_path / "zerolite" / str(stage)
        assert_same_bits(tensors_of(folder), tensors_of(tmp_path / "twin"))
        assert {tensor.dtype for tensor in tensors_of(folder).values()} == {dtype}
        for config in ("config.json", "generation_config.json"):
            assert json.loads((folder / config).read_text()) == json.loads((tmp_path / "twin" / config).read_text())
        names = sorted(path.name for path in folder.iterdir())
        kept = ["tokenizer.json"] if stage == 3 else []
        assert names == ["config.json", "generation_config.json", "model.safetensors", *kept]
        assert torch.equal(logits_of(opened(folder)), logits_of(opened(tmp_path / "twin")))
    assert sorted(path.name for path in (tmp_path / "zerolite").iterdir()) == ["0", "1", "2", "3"]


def export_in_files(folder: Path, stage: int):
    import zerolite
    from zerolite.checkpoint import folder_writer

    original = folder_writer.FILE_BYTES
    folder_writer.FILE_BYTES = 2000
    try:
        model = zerolite.shard(build("llama-tied", torch.float32), stage=stage).eval()
        zerolite.export(model, folder)
    finally:
        folder_writer.FILE_BYTES = original
    return logits_of(zerolite.load_pretrained(folder, stage=3 - stage))


@pytest.mark.parametrize("stage", [0, 3])
def test_an_export_in_several_files(ranks, tmp_path, stage):
    """A small file limit gives numbered files and an index that transformers and load_pretrained both read."""
    twin = build("llama-tied", torch.float32).eval()
    for logits in ranks(2).run(export_in_files, tmp_path / "model", stage):
        assert torch.equal(logits, logits_of(twin))
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert len(files) >= 3
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert index["metadata"]["total_size"] == sum(4 * p.numel() for p in twin.parameters())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "model" / file)
    assert sorted(index["weight_map"]) == sorted(tensors_of(tmp_path / "model")) == sorted(whole(twin))
    assert torch.equal(logits_of(opened(tmp_path / "model")), logits_of(twin))


class Buffered(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.last.weight = nn.Parameter(torch.zeros(3, 7))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("table", torch.ones(3), persistent=False)


def export_plain(folder: Path):
    import zerolite

    model = zerolite.shard(drawn(Buffered), stage=3)
    with zerolite.full_params(model):
        zerolite.export(model, folder)
        inside = whole(model)  # still whole
    return inside


def test_a_model_that_is_not_of_transformers(ranks, tmp_path):
    """It gives its safetensors alone, parameters and persistent buffers; inside full_params as well."""
    twin = drawn(Buffered)
    for parameters in ranks(2).run(export_plain, tmp_path / "model"):
        assert_same_bits(parameters, whole(twin))
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["model.safetensors"]
    assert_same_bits(tensors_of(tmp_path / "model"), twin.state_dict())


def export_and_fail(folder: Path, failure: str):
    import zerolite
    from zerolite.checkpoint import folder_writer
    from zerolite.runtime import atomic_dir as files
    from zerolite.runtime import safetensors_file

    def no_space(*args, **options):
        raise OSError(28, "No space left on device")

    write = safetensors_file.write_safetensors

    def full_disk_at_the_second_file(*args, **options):
        safetensors_file.write_safetensors = no_space
        write(*args, **options)

    model = zerolite.shard(build("llama", torch.float32), stage=3).eval()
    before = logits_of(model)
    originals = folder_writer.FILE_BYTES, files.commit_folder
    try:
        if failure == "disk full":
            folder_writer.FILE_BYTES, safetensors_file.write_safetensors = 100, full_disk_at_the_second_file
        elif failure == "commit":
            files.commit_folder = no_space
        error = attempt(lambda: zerolite.export(model, folder))
    finally:
        folder_writer.FILE_BYTES, files.commit_folder = originals
        safetensors_file.write_safetensors = write
    assert torch.equal(logits_of(model), before)
    buckets = [bucket for unit in model._zerolite.units for bucket in unit.buckets]
    is_sharded = all(bucket.parameters.state is ParameterState.SHARDED for bucket in buckets)
    assert is_sharded
    return error


@pytest.mark.parametrize("failure", ["disk full", "commit", "folders inside", "below a file"])
def test_an_export_that_fails_fails_everywhere_and_leaves_the_old(ranks, tmp_path, failure):
    """All ranks raise ZeroliteError with rank 0's reason; what stood there stays, and the model still runs."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("old")
    if failure == "folders inside":
        (folder / "checkpoint-1").mkdir()
        (folder / "checkpoint-1" / "manifest.json").write_text("weeks of work")
    before = tree(tmp_path)
    target = folder / "config.json" / "model" if failure == "below a file" else folder
    part = {"folders inside": "holds folders", "below a file": "Error"}.get(failure, "No space left")
    for kind, text in ranks(2).run(export_and_fail, target, failure):
        assert kind == "ZeroliteError" and "rank 0: " in text and part in text and str(target) in text, text
    assert tree(tmp_path) == before
