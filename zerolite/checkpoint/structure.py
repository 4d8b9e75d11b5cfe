"""What a checkpoint looks like, whatever its model: types of the manifest, names and shapes of files, cover of slices.

Hashes tell that a file is what was written. They do not tell that a program that could write it also wrote what `load`
expects: a file made by hand, or by another tool, has right hashes too.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from zerolite.errors import CheckpointError
from zerolite.shards.blocks import Block, whole
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
    expect(isinstance(manifest.get("mesh", {}), dict), "`mesh` is a dict")
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


class SavedSlice(NamedTuple):
    """What a file holds of one parameter or state."""

    block: Block  # of the whole tensor
    elements: Range  # of the flattened block


def slices_of_file(handle, path: Path, manifest: dict) -> dict[str, SavedSlice]:
    """Key -> what a rank's file holds of it. CheckpointError for other tensors than `save`'s.

    handle: the file, as safetensors opens it.
    """
    metadata = handle.metadata() or {}
    said = parse_json(metadata.get("slices"), f"{path.name}'s slices")
    expect(isinstance(said, dict), f"{path.name} has a dict of slices")
    expect(isinstance(metadata.get("extra"), str), f"{path.name} has an extra")
    blocks = parse_json(metadata.get("blocks", "{}"), f"{path.name}'s blocks")
    expect(isinstance(blocks, dict), f"{path.name} has a dict of blocks")
    found: dict[str, SavedSlice] = {}
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
        expect(name in manifest["parameters"], f"slices are of the model's parameters, got {_short(key)}")
        shape = tuple(manifest["parameters"][name])
        block = _block(key, blocks[key], shape) if key in blocks else whole(shape)
        found[key] = SavedSlice(block, Range(*ends))
    expect(not said, f"{path.name} holds {_some(said)}, which its slices name")
    is_whole = "mesh" not in manifest  # else a pipeline stage has its own alone
    expect(not buffers or not is_whole, f"{path.name} holds the buffers {_some(buffers)}")
    return found


def _block(key: str, said: Any, shape: tuple[int, ...]) -> Block:
    is_pair = isinstance(said, list) and len(said) == 2 and all(isinstance(part, list) for part in said)
    expect(is_pair and all(map(is_count, [*said[0], *said[1]])), f"{key}'s block is two lists of counts")
    block = Block(*map(tuple, said))
    expect(block.is_inside(shape), f"{key}'s block {block} lies in its shape {shape}")
    return block


def check_cover(slices: Mapping[str, Sequence[SavedSlice]], manifest: dict) -> None:
    """CheckpointError where sorted slices of a key overlap or leave a gap."""
    for key, parts in slices.items():
        ends: dict[Block, int] = {}
        for block, part in parts:
            end = ends.get(block, 0)
            expect(part.start == end, f"the slices of {key} cover it once, [{part.start}, {part.stop}) follows {end}")
            ends[block] = part.stop
        for block, end in ends.items():
            expect(end == block.numel, f"the slices of {key} end at {block.numel}, got {end}")
        numel = math.prod(manifest["parameters"][key.partition("/")[2]])
        total, blocks = sum(ends.values()), list(ends)
        expect(total == numel, f"the blocks of {key} have its {numel} elements, got {total}")
        for index, block in enumerate(blocks):
            alone = all(block.intersect(other) is None for other in blocks[:index])
            expect(alone, f"the blocks of {key} have no element in common, {block} has")


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
