"""`zerolite inspect FOLDER`: what a checkpoint, a Hugging Face folder or an adapter holds, and whether it is whole."""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from zerolite.checkpoint.manifest import MANIFEST
from zerolite.checkpoint.saved_files import SavedFolder
from zerolite.commands.command_line import OK, Parser, bytes_told, count_told, print_json, run, shown, table
from zerolite.commands.tensors import (
    Group,
    Tensor,
    dtypes_told,
    group_json,
    grouped,
    groups_table,
    tensors_of,
    tensors_of_file,
)
from zerolite.errors import CheckpointError

CONFIG, ADAPTER, ADAPTER_TENSORS = "config.json", "adapter_config.json", "adapter_model.safetensors"
VERSIONS = {"transformers": "transformers_version", "diffusers": "_diffusers_version"}  # keys of config.json
INDEXES = ("model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.json")  # whichever is there
TOLD = """\
FOLDER is a checkpoint of zerolite.save (manifest.json), a Hugging Face model (config.json) or an adapter
(adapter_config.json). Headers are read and hashes compared; no tensor is loaded, no code of the folder runs, and
pickles are not opened. A Hugging Face folder has no hashes: that its files are there, not cut, and hold what the index
says is all that can be checked.

  zerolite inspect outputs/medqa/checkpoint-100
  zerolite inspect step-1000 --no_hash          # at once, where the checkpoint is large: sizes and structure only
  zerolite inspect model --json | jq .tensors

exit status: 0 it is whole, 1 it is broken (the error names the file), 2 there is nothing to look at.
"""
STEP_NAMES = ("step", "global_step", "num_steps", "steps", "iteration", "it")


def main(argv: Sequence[str] | None = None) -> int:
    return run("inspect", inspect, argv)


def inspect(argv: Sequence[str]) -> int:
    """Raises CheckpointError for a broken folder, ValueError for one that is none of the known kinds."""
    parser = Parser("inspect", "What a checkpoint, a Hugging Face folder or an adapter holds; verifies it.", TOLD)
    parser.add_argument("folder", type=Path, help="a checkpoint, a Hugging Face folder, or an adapter's")
    parser.add_argument("--no_hash", action="store_true", help="do not read whole files to compare their SHA-256")
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    given = parser.parse_args(argv)
    found = _look(given)
    if given.json:
        print_json({"folder": str(given.folder), **found, "tensors": [group_json(group) for group in found["tensors"]]})
    else:
        print(_as_text(given.folder, found))
    return OK


def _look(given: argparse.Namespace) -> dict[str, Any]:
    folder: Path = given.folder
    if not folder.is_dir():
        raise ValueError(f"{folder}: is {'a file' if folder.exists() else 'not there'}, expected a folder")
    if (folder / MANIFEST).is_file():
        return _checkpoint(folder, not given.no_hash)
    try:
        if (folder / ADAPTER).is_file():
            return _adapter(folder)
        if (folder / CONFIG).is_file() or any(folder.glob("*.safetensors")):
            return _model(folder)
    except ValueError as error:  # what stands there is broken: exit status 1
        raise CheckpointError(str(error)) from error
    kinds = (MANIFEST, CONFIG, ADAPTER)
    inner = [path.name for path in sorted(folder.iterdir()) if any((path / name).is_file() for name in kinds)]
    hint = f"; look at {', '.join(f'{folder / name}' for name in inner[:4])}" if inner else ""
    raise ValueError(f"{folder}: holds none of {', '.join(kinds)}{hint}")


# A checkpoint #


def _checkpoint(folder: Path, hashes: bool) -> dict[str, Any]:
    with SavedFolder(folder, framework="numpy") as saved:
        saved.open()
        saved.open_files(0 if hashes else -1, 1)
        manifest = saved.manifest
        tensors = [tensor for handle in saved.handles for tensor in tensors_of(handle)]
        extra, _ = saved.extra_of_rank(0)
    model, versions = _mapping(manifest, "model"), _mapping(manifest, "versions")
    optimizer = manifest.get("optimizer")
    kinds: dict[str, int] = {}
    for tensor in tensors:
        kind = tensor.name.partition("/")[0]
        kinds[kind] = kinds.get(kind, 0) + tensor.nbytes
    saved_as = {
        tensor.name.partition("/")[2]: tensor.dtype for tensor in tensors if tensor.name.startswith("parameter/")
    }
    dtypes = _mapping(model, "dtypes")
    parameters = [
        Tensor(name, str(dtypes.get(name, saved_as.get(name, "?"))), tuple(shape))
        for name, shape in manifest["parameters"].items()
    ]
    return {
        "kind": "checkpoint",
        "stage": manifest.get("stage"),
        "world_size": manifest["world_size"],
        "step": _step(extra, optimizer),
        "versions": versions,
        "model": model.get("class"),
        "dtype": dtypes_told(parameters),
        "saved_dtype": dtypes_told(tensor for tensor in tensors if tensor.name.startswith("parameter/")),
        "holds_frozen": manifest.get("frozen", True),
        "has_config": isinstance(model.get("config"), dict),
        "num_parameters": sum(tensor.numel for tensor in parameters),
        "bytes": kinds,
        "optimizer": _optimizer(optimizer),
        "loss_scale": manifest.get("loss_scale"),
        "extra": _plain(extra),
        "files": {name: entry["bytes"] for name, entry in sorted(manifest["files"].items())},
        "verified": "sizes, structure and SHA-256 of every file"
        if hashes
        else "sizes and structure; no hash (--no_hash)",
        "tensors": grouped(parameters),
    }


def _mapping(values: dict[str, Any], name: str) -> dict[str, Any]:
    """An entry that a checkpoint of an older version lacks, and that a stranger may have written otherwise."""
    found = values.get(name)
    return found if isinstance(found, dict) else {}


def _optimizer(description: dict[str, Any] | None) -> dict[str, Any] | None:
    if description is None:
        return None
    groups = [
        {"num_parameters": len(group["params"]), **{name: value for name, value in group.items() if name != "params"}}
        for group in description["groups"]
    ]
    steps = sorted(set(description["steps"].values()))
    return {
        "class": description["class"],
        "groups": groups,
        "steps": steps[-1:] if len(steps) < 2 else [steps[0], steps[-1]],
    }


def _plain(extra: Any) -> Any:
    """`extra` as the user gave it; a tensor is a text."""
    if not isinstance(extra, dict) or len(extra) != 1:
        return extra
    ((tag, content),) = extra.items()
    if tag == "dict" and isinstance(content, dict):
        return {name: _plain(value) for name, value in content.items()}
    if tag in ("list", "tuple") and isinstance(content, list):
        return [_plain(value) for value in content]
    return f"tensor {content}" if tag == "tensor" else extra


def _step(extra: Any, optimizer: dict[str, Any] | None) -> int | None:
    """The step that `extra` names, at most two levels deep; else how often the optimizer stepped; None: neither."""
    level = [_plain(extra)]
    for _ in range(3):
        for values in level:
            if isinstance(values, int) and not isinstance(values, bool) and len(level) == 1:
                return values  # extra=step
            for name in STEP_NAMES:
                if isinstance(values, dict) and isinstance(values.get(name), int):
                    return values[name]
        level = [
            inner
            for values in level
            if isinstance(values, dict)
            for inner in values.values()
            if isinstance(inner, dict)
        ]
    steps = list(optimizer["steps"].values()) if optimizer is not None else []
    return max(steps, default=None)


# Folders of Hugging Face #


def _model(folder: Path) -> dict[str, Any]:
    config = _read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    files = {path.name: path for path in sorted(folder.glob("*.safetensors"))}
    listed: dict[str, str] = {}
    index = next((name for name in INDEXES if (folder / name).is_file()), None)
    if index is not None:
        listed = _mapping(_read_json(folder / index), "weight_map")
        missing = sorted({str(name) for name in listed.values()} - files.keys())
        if missing:
            raise ValueError(f"{folder / missing[0][:80]}: is missing, and {index} names it")
    if not files:
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt") for path in folder.glob(pattern))
        what = (
            f"its weights are pickles ({', '.join(pickles[:2])}), which are not opened"
            if pickles
            else "it has no weights"
        )
        raise ValueError(f"{folder}: holds no *.safetensors: {what}")
    by_file = {name: tensors_of_file(path) for name, path in files.items()}
    for name, tensors in by_file.items():
        lacking = {key for key, file in listed.items() if file == name} - {tensor.name for tensor in tensors}
        if lacking:
            raise ValueError(f"{files[name]}: lacks {min(lacking)}, which {index} says it holds")
    tensors = [tensor for found in by_file.values() for tensor in found]
    return {
        "kind": "Hugging Face model",
        "model": ", ".join(map(str, config.get("architectures") or []))
        or config.get("model_type")
        or config.get("_class_name"),
        "dtype": dtypes_told(tensors),
        "quantization": _mapping(config, "quantization_config").get("quant_method"),
        "versions": {library: config[key] for library, key in VERSIONS.items() if key in config},
        "num_parameters": sum(tensor.numel for tensor in tensors),
        "bytes": {"weights": sum(tensor.nbytes for tensor in tensors)},
        "has_tokenizer": any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")),
        "files": {name: path.stat().st_size for name, path in files.items()},
        "verified": "headers and sizes; such a folder has no hashes",
        "tensors": grouped(tensors),
    }


def _adapter(folder: Path) -> dict[str, Any]:
    config = _read_json(folder / ADAPTER)
    if not (folder / ADAPTER_TENSORS).is_file():
        raise ValueError(f"{folder / ADAPTER_TENSORS}: is missing; an adapter in a pickle (.bin) is not opened")
    tensors = tensors_of_file(folder / ADAPTER_TENSORS)
    kept = (
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "use_dora",
        "target_modules",
        "num_virtual_tokens",
        "task_type",
    )
    return {
        "kind": "adapter",
        "model": config.get("peft_type"),
        "base": config.get("base_model_name_or_path"),
        "settings": {name: config[name] for name in kept if config.get(name) not in (None, False)},
        "dtype": dtypes_told(tensors),
        "versions": {"peft": config["peft_version"]} if "peft_version" in config else {},
        "num_parameters": sum(tensor.numel for tensor in tensors),
        "bytes": {"adapter": sum(tensor.nbytes for tensor in tensors)},
        "files": {ADAPTER_TENSORS: (folder / ADAPTER_TENSORS).stat().st_size},
        "verified": "headers and sizes; such a folder has no hashes",
        "tensors": grouped(tensors),
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is no JSON ({type(error).__name__}: {str(error)[:80]})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return found


# Printing #


def _as_text(folder: Path, found: dict[str, Any]) -> str:
    versions = ", ".join(f"{shown(name, 20)} {shown(version, 40)}" for name, version in found["versions"].items())
    rows: list[tuple[str, str]] = [("model", shown(found["model"] or "not recorded"))]
    if found["kind"] == "checkpoint":
        rows += _checkpoint_rows(found)
    else:
        rows.append(("dtype", found["dtype"]))
    rows += [(name, shown(found[name])) for name in ("base", "quantization") if found.get(name)]
    rows += [(shown(name, 30), shown(value)) for name, value in found.get("settings", {}).items()]
    if "has_tokenizer" in found:
        rows.append(("tokenizer", "in the folder" if found["has_tokenizer"] else "not in the folder"))
    rows.append(("written by", versions or "not recorded"))
    rows.append(("numbers", f"{count_told(found['num_parameters'])} ({found['num_parameters']:,})"))
    rows.append(("files", _files(found["files"])))
    rows.append(("bytes", _bytes(found["bytes"])))
    rows.append(("verified", found["verified"]))
    groups: list[Group] = found["tensors"]
    title = f"{folder}: {'an' if found['kind'] == 'adapter' else 'a'} {found['kind']}"
    return f"{title}\n\n{table([(f'  {name}', text) for name, text in rows])}\n\n{groups_table(groups)}"


def _checkpoint_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    frozen = "" if found["holds_frozen"] else "; frozen parameters are left out (frozen=False)"
    rows = [
        ("step", "not recorded" if found["step"] is None else f"{found['step']:,}"),
        (
            "saved at",
            f"stage {found['stage']}, world size {found['world_size']}; it loads at any",
        ),
        ("dtype", f"{found['dtype']}, saved as {found['saved_dtype']}{frozen}"),
        ("config", "recorded: zerolite consolidate needs no other" if found["has_config"] else "not recorded"),
    ]
    optimizer = found["optimizer"]
    if optimizer is None:
        rows.append(("optimizer", "none"))
    else:
        steps = " to ".join(f"{count:,}" for count in optimizer["steps"]) or "none"
        rows.append(("optimizer", f"{shown(optimizer['class'])}, steps: {steps}"))
        for number, group in enumerate(optimizer["groups"][:8]):
            numbers = ", ".join(f"{shown(name, 20)} {shown(value, 30)}" for name, value in _numbers(group))
            rows.append((f"  group {number}", f"{group['num_parameters']} parameters, {numbers}"))
        if len(optimizer["groups"]) > 8:
            rows.append(("", f"and {len(optimizer['groups']) - 8} more groups: --json has all"))
    if found["loss_scale"] is not None:
        rows.append(("loss scale", shown(found["loss_scale"]["value"])))
    extra = found["extra"]
    rows.append(
        (
            "extra",
            ", ".join(shown(name, 30) for name in list(extra)[:8])
            if isinstance(extra, dict)
            else "none"
            if extra is None
            else shown(extra),
        )
    )
    return rows


def _numbers(group: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    first = ("lr", "betas", "eps", "weight_decay")
    return [(name, group[name]) for name in first if name in group]


def _files(files: dict[str, int]) -> str:
    names = list(files)
    told = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
    return f"{len(names)}: {shown(told)}"


def _bytes(kinds: dict[str, int]) -> str:
    told = ", ".join(f"{shown(kind, 30)} {bytes_told(size)}" for kind, size in kinds.items())
    return f"{bytes_told(sum(kinds.values()))}: {told}" if len(kinds) > 1 else told


if __name__ == "__main__":
    sys.exit(main())
