"""A checkpoint as a Hugging Face folder, on one process, with one parameter and one file in memory at a time.

What is written is what `export` writes of the same model: the same names, also where transformers converts them, and
the same bits, since a parameter of 16 bits is its fp32 master, rounded as its shard rounded it.
"""

import itertools
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import nn

from zerolite.checkpoint.empty_model import build_empty, cause_of
from zerolite.checkpoint.folder_writer import FolderWriter
from zerolite.checkpoint.saved_files import SavedFolder
from zerolite.errors import CheckpointError
from zerolite.offload.shard_memory import round_bf16
from zerolite.runtime.safetensors_file import DTYPES
from zerolite.shards.blocks import copy, whole
from zerolite.shards.layout import Range

BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
ROUNDED = (torch.float32, torch.bfloat16)
CONFIG, GENERATION = "config.json", "generation_config.json"


@dataclass(frozen=True)
class Consolidated:
    """What was written."""

    num_parameters: int
    num_files: int
    num_bytes: int  # of the tensors
    dtype: torch.dtype | None  # of the first parameter
    has_config: bool


def consolidate(
    checkpoint: Path,
    folder: Path,
    config_folder: Path | None = None,
    dtype: torch.dtype | None = None,
    beside: Sequence[Path] = (),
) -> Consolidated:
    """Write the parameters and buffers of a checkpoint as a Hugging Face folder, which appears whole or not at all.

    config_folder: whose config.json describes the model; None: the one that the checkpoint recorded.
    dtype: of all floating parameters; None: those that the model had, or, of an older checkpoint, the configuration's.
    beside: files (a tokenizer's) that the folder gets too.
    Raises ValueError where `folder` exists, no configuration can be had, it is of another model, or the checkpoint
    holds no frozen parameters. Raises CheckpointError for a checkpoint that is broken.
    """
    if folder.exists() or folder.is_symlink():
        raise ValueError(f"{folder}: exists; name a folder that does not")
    with SavedFolder(checkpoint) as saved:
        saved.open()
        if not saved.manifest.get("frozen", True):
            raise ValueError(
                f"{checkpoint}: was saved without its frozen parameters (frozen=False), as runs of adapters are: load "
                "it on its base, then zerolite.adapters.save or merge"
            )
        saved.open_files(0, 1)
        dtypes = _dtypes(saved, dtype)
        model = _model_of(saved, config_folder, dtypes, dtype)
        buffers = {name: _tensor(saved, f"buffer/{name}") for name in saved.manifest["buffers"]}
        described = {
            _written_name(model, name): torch.empty(shape, dtype=dtypes[name], device="meta")
            for name, shape in saved.manifest["parameters"].items()
        } | {name: torch.empty_like(buffer, device="meta") for name, buffer in buffers.items()}
        writer = FolderWriter(folder.resolve(), model, described)
        writer.open()
        try:
            for path in beside:
                shutil.copy2(path, writer.written / path.name)
            away = _ties_away(saved)
            for names in _groups(model, saved.manifest["parameters"]):
                writer.add(
                    {_written_name(model, name): _whole(saved, name, dtypes[name], name in away) for name in names}
                )
            writer.finish(buffers)
        except BaseException:
            writer.discard()
            raise
    first = next(iter(saved.manifest["parameters"]), None)
    return Consolidated(
        len(saved.manifest["parameters"]),
        writer.num_files,
        writer.total_bytes,
        dtypes[first] if first is not None else None,
        isinstance(model, transformers.PreTrainedModel),
    )


def _dtypes(saved: SavedFolder, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """Of every parameter: what was asked for, else what the model had, else what it was saved in."""
    model = saved.manifest.get("model")
    recorded = model.get("dtypes") if isinstance(model, dict) else None
    found: dict[str, torch.dtype] = {}
    for name in saved.manifest["parameters"]:
        parts = saved.slices.get(f"parameter/{name}")
        kept = BY_NAME.get(parts[0][1].get_slice(f"parameter/{name}").get_dtype(), torch.float32) if parts else None
        had = BY_NAME.get(str(recorded.get(name))) if isinstance(recorded, dict) else None
        own = had or kept or torch.float32
        found[name] = dtype if dtype is not None and own.is_floating_point else own
    return found


# The model that the parameters are of #


def _model_of(
    saved: SavedFolder, config_folder: Path | None, dtypes: dict[str, torch.dtype], dtype: torch.dtype | None
) -> nn.Module:
    """On the meta device, with the checkpoint's parameters; a bare Module for one that is none of transformers."""
    model = saved.manifest.get("model")
    recorded = model if isinstance(model, dict) else {}
    if config_folder is not None:
        config = _read(config_folder, saved)
    elif isinstance(recorded.get("config"), dict):
        with tempfile.TemporaryDirectory() as name:
            for file, key in ((CONFIG, "config"), (GENERATION, "generation_config")):
                if isinstance(recorded.get(key), dict):
                    (Path(name) / file).write_text(json.dumps(recorded[key]), encoding="utf-8")
            config = _read(Path(name), saved, f"{saved.folder}: the configuration that it recorded")
    elif "class" in recorded and "config" not in recorded:
        return nn.Module()
    else:
        raise ValueError(
            f"{saved.folder}: recorded no configuration: name a folder with the model's config.json (--config)"
        )
    built, generation = config
    if dtype is None and "dtypes" not in recorded and built.dtype is not None:  # a checkpoint of an older version
        dtypes.update({name: built.dtype for name, own in dtypes.items() if own.is_floating_point})
    built.dtype = next(iter(dtypes.values()), None)
    try:
        found = build_empty(built)
    except Exception as error:  # transformers raises whatever a wrong value happens to hit
        raise ValueError(f"{saved.folder}: no model can be built of its configuration: {cause_of(error)}") from error
    if generation is not None:
        found.generation_config = generation
    _compare(found, saved)
    return found


def _read(folder: Path, saved: SavedFolder, told: str | None = None):
    """(configuration, generation configuration or None); no code of the folder runs."""
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        num_layers = getattr(config.get_text_config(), "num_hidden_layers", None)
        if isinstance(num_layers, int) and num_layers > len(saved.manifest["parameters"]):
            raise ValueError(f"it asks for {num_layers:,} layers, and the checkpoint holds fewer parameters")
        generation = None
        if (folder / GENERATION).is_file():
            generation = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # as above
        raise ValueError(f"{told or folder / CONFIG} cannot be used: {cause_of(error)}") from error
    return config, generation


def _compare(model: nn.Module, saved: SavedFolder) -> None:
    """ValueError where the configuration is of another model than the checkpoint."""
    here = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    there = saved.manifest["parameters"]
    for name in itertools.chain(there, here):
        if here.get(name) != there.get(name):
            hint = "; adapters are not exported: merge them first" if "lora" in name else ""
            raise ValueError(
                f"{saved.folder}: is not of the model that its configuration describes: {name[:80]} is "
                f"{there.get(name, 'absent')} in it and {here.get(name, 'absent')} in that model{hint}"
            )


def _groups(model: nn.Module, names: Sequence[str]) -> Iterator[list[str]]:
    """Parameters that are written together: each alone, or a layer's where transformers converts some of them."""
    converts = False
    if isinstance(model, transformers.PreTrainedModel):
        from transformers.conversion_mapping import get_model_conversion_mapping

        converts = bool(get_model_conversion_mapping(model, add_legacy=False))
    for _, group in itertools.groupby(names, key=_layer_of if converts else str):
        yield list(group)


def _layer_of(name: str) -> str:
    match = re.match(r".*?\.\d+(?=\.)", name)
    return match[0] if match else name


def _written_name(model: nn.Module, name: str) -> str:
    return getattr(model, "all_tied_weights_keys", {}).get(name, name)


# Reading #


def _ties_away(saved: SavedFolder) -> set[str]:
    """Parameters whose shards rounded a master half-way between two bf16 numbers away from zero."""
    model = saved.manifest.get("model")
    names = model.get("ties_away") if isinstance(model, dict) else None
    return {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()


def _whole(saved: SavedFolder, name: str, dtype: torch.dtype, is_away: bool) -> torch.Tensor:
    """One parameter of all ranks' slices."""
    shape, key = saved.manifest["parameters"][name], f"parameter/{name}"
    found = torch.empty(shape, dtype=dtype)
    everything = whole(tuple(shape)), Range(0, found.numel())
    for saved_slice, handle in saved.slices.get(key, ()):
        values = handle.get_slice(key)[:]
        if not (values.is_floating_point() or values.dtype == dtype):
            raise CheckpointError(f"{saved.folder}: {key} is of {values.dtype}, its model's of {dtype}")
        values = round_bf16(values) if is_away and (values.dtype, dtype) == ROUNDED else values
        copy(found.view(-1), everything, values, saved_slice)
    return found


def _tensor(saved: SavedFolder, key: str) -> torch.Tensor:
    return saved.of_buffer(0, key.removeprefix("buffer/")).get_tensor(key)
