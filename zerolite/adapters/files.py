"""Adapters as folders that PEFT opens: written whole or not at all, read back and compared, and loaded.

A folder holds adapter_config.json and adapter_model.safetensors. lora_files.py and prompt_files.py translate their
content; this file moves it between disk and model.
"""

import contextlib
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from zerolite.adapters import lora_files, prompt_files
from zerolite.adapters.config import LoraConfig, PromptConfig
from zerolite.adapters.state import Adapter, adapter_of
from zerolite.adapters.walk import unsharded_parameters
from zerolite.engine.engine import find_engine
from zerolite.errors import ZeroliteError
from zerolite.runtime import atomic_dir as files
from zerolite.runtime import safetensors_file
from zerolite.runtime.rank_errors import on_all_ranks

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
FORMATS = {"LORA": lora_files, **dict.fromkeys(prompt_files.KINDS, prompt_files)}

MAX_CONFIG_BYTES = 16 << 20  # of adapter_config.json: PEFT's are some KB
# Float8 numbers mean nothing without the scales of the format that they are from.
DTYPES_BY_NAME = {
    name: dtype for dtype, name in safetensors_file.DTYPES.items() if dtype.is_floating_point and dtype.itemsize > 1
}

Content = tuple[dict, dict[str, Tensor]]  # a configuration, and tensors by their names in the file


def save(model: nn.Module, folder: str | os.PathLike[str], name: str | None = None) -> None:
    """Write an adapter, the active one or the one called `name`, as a folder that PEFT opens. Collective if sharded.

    Rank 0 writes. Values keep the parameters' dtype. The folder is written beside its place, read again, compared with
    memory and renamed, so an older adapter in that place stays whole until then. Other files of the folder are kept.
    Raises ValueError where there is no such adapter. Raises ZeroliteError, on every rank, where the folder cannot be
    written, a value is NaN or Inf, or the file reads back differently. On a model that is not sharded, other errors of
    writing (OSError, ValueError) reach the caller as they are.
    """
    engine = find_engine(model)
    adapter = adapter_of(model, name)
    folder = Path(folder).resolve()
    if engine is not None:
        engine.fetch()
    # On every rank: `to_peft` runs a prompt's encoder, and hooks of its forward may be collective.
    kind = lora_files if isinstance(adapter.config, LoraConfig) else prompt_files
    content = kind.to_peft(model, adapter)
    if engine is None:
        _write(adapter, folder, *content)
        return
    work = partial(_write, adapter, folder, *content) if engine.mesh.rank == 0 else lambda: None
    on_all_ranks(engine, f"saving adapter {adapter.name!r} to {folder}", ZeroliteError, work)


@torch.no_grad()
def load(model: nn.Module, folder: str | os.PathLike[str], name: str = "default") -> nn.Module:
    """Load an adapter from a folder that PEFT or `save` wrote; returns the model. Collective if sharded.

    A model that is not sharded gets a new adapter called `name`, as the active one, and its base is frozen. A sharded
    model has its adapter called `name` already, of the same kind and shapes, and gets its values: each rank reads the
    folder. Values are cast to the dtype of the layers.
    Raises ValueError, with the folder and the key, for a folder that is incomplete or damaged, for tensors that are
    missing, left over, of another shape or not finite, and for a configuration that is not supported; the model is as
    it was. On a sharded model that is a ZeroliteError on every rank.
    """
    folder = Path(folder)
    engine = find_engine(model)
    if engine is None:
        with _naming(folder):
            config, header = _read_header(folder)
            kind = FORMATS[config["peft_type"]]
            kind.check(model, config, header)
            kind.from_peft(model, name, config, _read_tensors(folder))
        return model
    adapter = adapter_of(model, name)
    values: dict[str, Tensor] = {}

    def read() -> None:
        with _naming(folder):
            config, header = _read_header(folder)
            _values_for(model, adapter, config, header)
            values.update(_values_for(model, adapter, config, _read_tensors(folder)))

    on_all_ranks(engine, f"loading adapter {name!r} from {folder}", ZeroliteError, read)
    by_id = {id(adapter.parameters[key]): value for key, value in values.items()}
    for parameters in unsharded_parameters(model, [adapter.parameters[key] for key in values], writeback=True):
        for parameter in parameters:
            parameter.copy_(by_id[id(parameter)])
    return model


def _values_for(model: nn.Module, adapter: Adapter, config: dict, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The file's values for an adapter that the model has, by the names of its parameters."""
    ours, theirs = _peft_type(adapter.config), config["peft_type"]
    if ours != theirs:
        raise ValueError(f"the folder holds an adapter of peft_type {theirs}, the model's {adapter.name!r} is {ours}")
    if isinstance(adapter.config, LoraConfig):
        return lora_files.values_of(model, adapter, config, tensors)
    shapes = {name: tuple(parameter.shape) for name, parameter in adapter.parameters.items()}
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if len(shapes) > 1 or list(shapes.values()) != list(found.values()):
        raise ValueError(
            f"the folder holds {found}, the model's adapter {adapter.name!r} has {shapes}: add one of that size "
            "without an encoder, whose values PEFT does not keep, or load the folder before zerolite.shard"
        )
    return dict(zip(shapes, tensors.values(), strict=True))


def _peft_type(config: LoraConfig | PromptConfig) -> str:
    return "LORA" if isinstance(config, LoraConfig) else prompt_files.PEFT_TYPES[config.kind]


# Writing #


def _write(adapter: Adapter, folder: Path, config: dict, tensors: dict[str, Tensor]) -> None:
    _check_values(adapter, tensors)
    if folder.exists() and not (folder.is_dir() and all(path.is_file() for path in folder.iterdir())):
        raise ValueError(f"{folder} is no folder of files alone, which saving an adapter replaces: name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    files.restore(folder)
    files.remove_leftovers(folder)
    written = files.beside(folder, uuid.uuid4().hex[:12])
    written.mkdir()
    try:
        (written / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        entries = [(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()]
        safetensors_file.write_safetensors(written / TENSORS, entries, tensors.values(), {"format": "pt"})
        for other in folder.iterdir() if folder.is_dir() else ():
            if other.name not in (CONFIG, TENSORS):
                shutil.copy2(other, written / other.name)
        for path in written.iterdir():
            files.sync_file(path)
        _compare(written, config, tensors)
        files.commit_folder(written, folder)
    finally:
        shutil.rmtree(written, ignore_errors=True)


def _check_values(adapter: Adapter, tensors: dict[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ZeroliteError(f"{key} of adapter {adapter.name!r} holds NaN or Inf: it is not saved")
    Bs = [tensor for key, tensor in tensors.items() if key.endswith("lora_B.weight")]
    if Bs and not any(B.any() for B in Bs):
        # A new LoRA is like this, so it is no error; after a training it means that nothing was learnt.
        warnings.warn(f"adapter {adapter.name!r} adds nothing to its base: every lora_B is zero", stacklevel=2)


def _compare(folder: Path, config: dict, tensors: dict[str, Tensor]) -> None:
    """Read the written folder as `load` does. ZeroliteError where it differs from memory."""
    (read_config, _), read = _read_header(folder), _read_tensors(folder)
    if read_config != config or read.keys() != tensors.keys():
        raise ZeroliteError(f"what was written to {folder} reads back with another configuration or other names")
    for key, tensor in tensors.items():
        if read[key].dtype != tensor.dtype or not torch.equal(read[key], tensor.cpu()):
            raise ZeroliteError(f"{key} reads back from {folder} as other values than memory holds: is the disk sound?")


# Reading #


@contextlib.contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Inside, a ValueError about what stands in the folder has the folder's name."""
    try:
        yield
    except ValueError as error:
        if str(folder) in str(error):
            raise
        raise ValueError(f"{folder}: {error}") from error


def _read_header(folder: Path) -> Content:
    """Configuration of a PEFT folder, and its tensors on the meta device; ValueError where it is incomplete or damaged.

    What the tensors are is checked against the model before their values, which may be gigabytes, are read.
    """
    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            has_pickle = name == TENSORS and (folder / "adapter_model.bin").is_file()
            what = "only a pickle, adapter_model.bin: save it again with PEFT" if has_pickle else "give a PEFT folder"
            raise ValueError(f"{folder} holds no {name}: {what}")
    num_bytes = (folder / CONFIG).stat().st_size
    if num_bytes > MAX_CONFIG_BYTES:
        raise ValueError(f"{folder / CONFIG} has {num_bytes:,} bytes, PEFT's have some thousand: it is not read")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{folder / CONFIG} is no JSON ({error})") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind not in list(FORMATS):  # whatever JSON holds there, hashable or not
        raise ValueError(f"{folder / CONFIG} has peft_type {kind!r:.80}: supported are {', '.join(FORMATS)}")
    return config, _read_each(folder, _on_meta)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    tensors = _read_each(folder, lambda file, key: file.get_tensor(key))
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{key} of {folder / TENSORS} holds NaN or Inf")
    return tensors


def _read_each(folder: Path, read: Callable[..., Tensor]) -> dict[str, Tensor]:
    try:
        with safe_open(folder / TENSORS, framework="pt") as file:
            return {key: read(file, key) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{folder / TENSORS} is truncated or no safetensors file ({error})") from error
    except (OSError, MemoryError) as error:  # it is mapped into memory: a limit on addresses counts, too
        raise ValueError(f"{folder / TENSORS} cannot be opened ({error})") from error


def _on_meta(file, key: str) -> Tensor:
    described = file.get_slice(key)
    dtype = DTYPES_BY_NAME.get(described.get_dtype())
    if dtype is None:
        raise ValueError(
            f"{key} of {TENSORS} is of dtype {described.get_dtype()}: adapters are floats of 16 bits or more"
        )
    return torch.empty(described.get_shape(), dtype=dtype, device="meta")
