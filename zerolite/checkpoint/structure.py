"""What a checkpoint looks like, whatever its model: types of the manifest, names and shapes of files, cover of slices.

Hashes tell that a file is what was written. They do not tell that a program that could write it also wrote what `load`
expects: a file made by hand, or by another tool, has right hashes too.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zerolite.errors import CheckpointError
from zerolite.shards.layout import Range

FLOATS = {"F64", "F32", "F16", "BF16"}  # which are read into each other
MAX_STEPS = 1 << 31


def expect(holds: bool, what: str) -> None:
    """CheckpointError saying what was expected, where it does not hold."""
    if not holds:
        raise CheckpointError(f"the checkpoint is not as zerolite.save writes it: {what}; use another one")


def is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_number(value) -> bool:
    """A finite int or float that fp64 holds."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 1 << 53


def check_manifest(manifest: dict) -> None:
    """CheckpointError for a manifest whose fields are not of the types that `save` writes."""
    files = manifest.get("files")
    expect(isinstance(files, dict) and len(files) > 0, "manifest.json's `files` are a dict of one file a rank")
    assert isinstance(files, dict)
    names = [f"rank-{rank:05d}.safetensors" for rank in range(len(files))]
    expect(sorted(files) == names, f"`files` are rank-00000.safetensors to {names[-1]}, got {_some(files)}")
    expect(manifest.get("world_size") == len(files), f"`world_size` is {len(files)}, the number of its files")
    for name, entry in files.items():
        expect(isinstance(entry, dict) and is_count(entry.get("bytes")), f"`files` has the number of bytes of {name}")
        digest = entry.get("sha256")
        expect(isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{64}", digest) is not None, f"a SHA-256 of {name}")
    expect(isinstance(manifest.get("frozen", True), bool), "`frozen` is a bool")
    for what in ("parameters", "buffers"):
        shapes = manifest.get(what)
        expect(isinstance(shapes, dict), f"`{what}` is a dict of shapes")
        assert isinstance(shapes, dict)
        for name, shape in shapes.items():
            expect(isinstance(shape, list) and all(map(is_count, shape)), f"`{what}` has a shape of {name}")
    _check_optimizer(manifest.get("optimizer"))
    scale = manifest.get("loss_scale")
    if scale is not None:
        expect(isinstance(scale, dict), "`loss_scale` is a dict or null")
        expect(is_number(scale.get("value")) and scale["value"] > 0, "`loss_scale` has a positive value")
        expect(is_count(scale.get("num_good_steps")), "`loss_scale` has a number of good steps")


def _check_optimizer(description: Any) -> None:
    if description is None:
        return
    expect(isinstance(description, dict), "`optimizer` is a dict or null")
    expect(isinstance(description.get("class"), str), "`optimizer` has a class")
    groups, steps = description.get("groups"), description.get("steps")
    expect(isinstance(groups, list) and all(isinstance(group, dict) for group in groups), "param groups are dicts")
    assert isinstance(groups, list)
    for group in groups:
        names = group.get("params")
        expect(isinstance(names, list) and all(isinstance(name, str) for name in names), "a param group has names")
    expect(isinstance(steps, dict), "`steps` is a dict")
    assert isinstance(steps, dict)
    for name, count in steps.items():
        expect(is_count(count) and count < MAX_STEPS, f"{name} has taken a number of steps, got {_short(count)}")


def check_hyperparameters(groups: Sequence[Mapping], defaults: Mapping) -> None:
    """CheckpointError for saved param groups that lack a hyperparameter or have one that no step can use."""
    for index, group in enumerate(groups):
        for name, default in defaults.items():
            where = f"{name} of param group {index}"
            expect(name in group, f"{where} is saved")
            value = group[name]
            if name == "betas":
                pair = isinstance(value, list) and len(value) == 2 and all(map(is_number, value))
                expect(pair and all(0 <= beta < 1 for beta in value), f"{where} are two in [0, 1), got {_short(value)}")
            elif name == "lr":
                expect(is_number(value), f"{where} is a finite number, got {_short(value)}")
            elif is_number(default):
                expect(is_number(value) and value >= 0, f"{where} is a number of at least 0, got {_short(value)}")


def slices_of_file(handle, path: Path, manifest: dict) -> dict[str, Range]:
    """Key -> elements of the flat parameter that a rank's file holds. CheckpointError for other tensors than `save`'s.

    handle: the file, as safetensors opens it.
    """
    metadata = handle.metadata() or {}
    said = parse_json(metadata.get("slices"), f"{path.name}'s slices")
    expect(isinstance(said, dict), f"{path.name} has a dict of slices")
    expect(isinstance(metadata.get("extra"), str), f"{path.name} has an extra")
    found: dict[str, Range] = {}
    buffers = set(manifest["buffers"])
    for key in handle.keys():
        tensor = handle.get_slice(key)
        kind, _, name = key.partition("/")
        if kind == "extra":
            continue
        if kind == "buffer":
            expect(name in buffers, f"{path.name} has buffers of the model, got {_short(name)}")
            shape = manifest["buffers"][name]
            expect(tensor.get_shape() == shape, f"{key} in {path.name} has the shape {shape}, got {tensor.get_shape()}")
            buffers.remove(name)
            continue
        expect(key in said, f"{path.name} says which slice {_short(key)} is")
        ends = said.pop(key)
        expect(isinstance(ends, list) and len(ends) == 2 and all(map(is_count, ends)), f"{key}'s slice is two counts")
        length = [ends[1] - ends[0]]
        expect(tensor.get_shape() == length, f"{key} in {path.name} has {length} elements, got {tensor.get_shape()}")
        is_float = tensor.get_dtype() in FLOATS
        expect(kind == "parameter" or is_float, f"{key} in {path.name} holds floats, got {tensor.get_dtype()}")
        found[key] = Range(*ends)
    expect(not said, f"{path.name} holds {_some(said)}, which its slices name")
    expect(not buffers, f"{path.name} holds the buffers {_some(buffers)}")
    return found


def check_cover(slices: Mapping[str, Sequence[Range]], manifest: dict) -> None:
    """CheckpointError where sorted slices of a key overlap, leave a gap, or are of no parameter."""
    for key, parts in slices.items():
        name = key.partition("/")[2]
        expect(name in manifest["parameters"], f"slices are of the model's parameters, got {_short(key)}")
        end = 0
        for part in parts:
            expect(part.start == end, f"the slices of {key} cover it once, [{part.start}, {part.stop}) follows {end}")
            end = part.stop
        numel = math.prod(manifest["parameters"][name])
        expect(end == numel, f"the slices of {key} end at {numel}, got {end}")


def parse_json(text: Any, what: str) -> Any:
    """The value; CheckpointError for what is no text, no JSON, or nested too deeply."""
    expect(isinstance(text, str), f"{what} are there")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} are no JSON ({type(error).__name__}): use another checkpoint") from error


def _short(value) -> str:
    """A stranger's value for an error, cut."""
    return str(value)[:60] if isinstance(value, str | float | bool | None) or is_number(value) else type(value).__name__


def _some(names) -> str:
    return ", ".join(name[:60] for name in sorted(names)[:4])
