"""Is a checkpoint whose hashes are right, and whose structure is not what `save` writes, refused before all changes?"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from resigned import edit_file, edit_manifest, edit_metadata, join, split, unchanged
from saved import attempt, make, rank, save_steps, state

import zerolite

FIRST, SECOND = "rank-00000.safetensors", "rank-00001.safetensors"
KEY = "parameter/first.weight"


def rename(name: str) -> Callable[[Path], None]:
    """The second file lies elsewhere, whole, and the manifest says where."""

    def edit(folder: Path) -> None:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / SECOND).rename(target)
        edit_manifest(folder, lambda m: m["files"].update({name: m["files"].pop(SECOND)}))

    return edit


def to_absolute(folder: Path) -> None:
    rename(str(folder.parent / "victim" / SECOND))(folder)


def to_link(folder: Path) -> None:
    target = folder.parent / "victim"
    target.mkdir(exist_ok=True)
    (folder / SECOND).rename(target / SECOND)
    (folder / SECOND).symlink_to(target / SECOND)
    edit_manifest(folder, lambda m: None)


def to_fifo(folder: Path) -> None:
    (folder / SECOND).unlink()
    os.mkfifo(folder / SECOND)


def extra_file(folder: Path) -> None:
    shutil.copy(folder / FIRST, folder / "rank-00007.safetensors")
    edit_manifest(folder, lambda m: m["files"].update({"rank-00007.safetensors": {}}))


def field(*path: str | int, value) -> Callable[[Path], None]:
    """One value of the manifest is another."""

    def change(manifest: dict) -> None:
        inner = manifest
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    return lambda folder: edit_manifest(folder, change)


def metadata(key: str, change: Callable) -> Callable[[Path], None]:
    return lambda folder: edit_metadata(folder, FIRST, key, change)


def retyped(key: str, dtype: str) -> Callable[[Path], None]:
    """The same bytes under another dtype of the same width."""
    return lambda folder: edit_file(folder, FIRST, lambda header: header[key].update(dtype=dtype))


def one_element(folder: Path) -> None:
    """A tensor of one element stands for a slice of many: it would be broadcast."""
    header, body = split(folder / FIRST)
    header[KEY]["shape"] = [1]
    header[KEY]["dtype"] = "F64"
    start, stop = header[KEY]["data_offsets"]
    header[KEY]["data_offsets"] = [start, start + 8]
    cut = stop - start - 8
    for name, entry in header.items():
        if name != "__metadata__" and entry["data_offsets"][0] >= stop:
            entry["data_offsets"] = [offset - cut for offset in entry["data_offsets"]]
    join(folder / FIRST, header, body[: start + 8] + body[stop:])
    edit_manifest(folder, lambda m: None)


def shifted(by: int) -> Callable[[dict], dict]:
    """One slice says that it lies elsewhere: a gap before it, and an overlap behind."""
    return lambda slices: {**slices, KEY: [end + by for end in slices[KEY]]}


def without(key: str) -> Callable[[dict], dict]:
    return lambda values: {name: value for name, value in values.items() if name != key}


def drop_tensor(key: str) -> Callable[[Path], None]:
    """The tensor keeps its bytes under another name."""

    def change(header: dict) -> None:
        header["extra/99"] = header.pop(key)

    return lambda folder: edit_file(folder, FIRST, change)


def lacks_slice(folder: Path) -> None:
    """Neither the tensor nor its slice: half of the parameter is nowhere."""
    edit_metadata(folder, FIRST, "slices", without(KEY))
    drop_tensor(KEY)(folder)


def ends_early(folder: Path) -> None:
    one_element(folder)
    edit_metadata(folder, FIRST, "slices", lambda slices: {**slices, KEY: [0, 1]})


def given_twice(folder: Path) -> None:
    """Another slice of the second file says that it is the end of a parameter that the first one has whole."""
    header, _ = split(folder / SECOND)
    other = next(k for k, e in header.items() if k.startswith("parameter/") and 0 < e["shape"][0] <= 35)
    (length,) = header[other]["shape"]
    edit_file(folder, SECOND, lambda header: header.update({KEY: header.pop(other)}))
    edit_metadata(folder, SECOND, "slices", lambda slices: {**without(other)(slices), KEY: [35 - length, 35]})


DEEP = "[" * 5000 + "]" * 5000
STRUCTURES: dict[str, tuple[Callable[[Path], None], str]] = {
    "file beside": (rename("../victim/" + SECOND), "`files` are"),
    "file below": (rename("inner/" + SECOND), "`files` are"),
    "absolute file": (to_absolute, "`files` are"),
    "other name": (rename("rank-1.safetensors"), "`files` are"),
    "link": (to_link, "is a link"),
    "fifo": (to_fifo, "no plain file"),
    "a file too many": (extra_file, "`files` are"),
    "no files": (field("files", value={}), "`files`"),
    "world": (field("world_size", value=7), "`world_size`"),
    "frozen": (field("frozen", value="no"), "`frozen`"),
    "shape of floats": (field("parameters", "scalar", value=[1.5]), "shape of scalar"),
    "huge shape": (field("parameters", "scalar", value=[1 << 62] * 40), "another model"),
    "negative shape": (field("buffers", "sum", value=[-5]), "shape of sum"),
    "groups": (field("optimizer", "groups", value=7), "param groups"),
    "lr text": (field("optimizer", "groups", 0, "lr", value="abc"), "lr of param group 0"),
    "lr NaN": (field("optimizer", "groups", 1, "lr", value=float("nan")), "lr of param group 1"),
    "lr infinite": (field("optimizer", "groups", 1, "lr", value=float("inf")), "lr of param group 1"),
    "lr true": (field("optimizer", "groups", 1, "lr", value=True), "lr of param group 1"),
    "lr huge": (field("optimizer", "groups", 1, "lr", value=10**400), "lr of param group 1"),
    "three betas": (field("optimizer", "groups", 0, "betas", value=[0.9, 0.9, 0.9]), "betas of param group 0"),
    "large beta": (field("optimizer", "groups", 0, "betas", value=[0.9, 1.5]), "betas of param group 0"),
    "eps": (field("optimizer", "groups", 0, "eps", value=-1), "eps of param group 0"),
    "weight decay": (field("optimizer", "groups", 0, "weight_decay", value=None), "weight_decay of param group 0"),
    "negative steps": (field("optimizer", "steps", "scalar", value=-3), "scalar has taken a number of steps"),
    "steps of text": (field("optimizer", "steps", "scalar", value="3"), "scalar has taken a number of steps"),
    "many steps": (field("optimizer", "steps", "scalar", value=1 << 70), "scalar has taken a number of steps"),
    "half a step": (field("optimizer", "steps", "scalar", value=0.5), "scalar has taken a number of steps"),
    "loss scale": (field("loss_scale", value={"value": -1.0, "num_good_steps": 0}), "`loss_scale`"),
    "slices": (metadata("slices", lambda slices: 7), "dict of slices"),
    "slices of no JSON": (metadata("slices", lambda slices: "{"), "are no JSON"),
    "deep slices": (metadata("slices", lambda slices: DEEP), "slices"),
    "slice of text": (metadata("slices", lambda slices: {**slices, KEY: ["0", "1"]}), "two counts"),
    "no slice": (metadata("slices", without(KEY)), "which slice parameter/first.weight is"),
    "slice without tensor": (drop_tensor(KEY), "holds parameter/first.weight"),
    "neither": (lacks_slice, "holds no parameter/first.weight"),
    "slice moved": (metadata("slices", shifted(3)), "slices of parameter/first.weight"),
    "ends early": (ends_early, "parameter/first.weight end at 35, got 1"),
    "given twice": (given_twice, "parameter/first.weight cover it once"),
    "long slice": (metadata("slices", lambda slices: {**slices, KEY: [0, 1 << 60]}), "elements"),
    "one element": (one_element, "elements, got [1]"),
    "strange kind of floats": (retyped(KEY, "I64"), "is I64"),
    "states as integers": (retyped("exp_avg/first.weight", "I64"), "holds floats"),
    "buffer as floats": (retyped("buffer/count", "F64"), "buffer/count is F64"),
    "no buffer": (drop_tensor("buffer/sum"), "holds the buffers sum"),
    "extra without tensor": (metadata("extra", lambda extra: {"tensor": "extra/7"}), "extra/7"),
    "extra of a parameter": (metadata("extra", lambda extra: {"tensor": KEY}), "extra is not as"),
    "extra of a tag": (metadata("extra", lambda extra: {"set": []}), "extra is not as"),
    "extra of two tags": (metadata("extra", lambda extra: {"list": [], "dict": {}}), "extra is not as"),
    "deep extra": (metadata("extra", lambda extra: DEEP), "extra"),
}


def load_edited(folder: Path, names: list[str]) -> list[tuple[str, str, bool]]:
    model, optimizer = make(3, seed=1)
    before = state(model, optimizer)
    results = []
    for index, name in enumerate(names):
        copy = folder.parent / "copies" / str(index) / "step"
        if rank() == 0:
            shutil.copytree(folder, copy)
            STRUCTURES[name][0](copy)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        error = attempt(lambda copy=copy: zerolite.load(model, copy, optimizer))
        results.append((*error, unchanged(before, state(model, optimizer))))
    zerolite.load(model, folder, optimizer)
    return results


def test_what_save_does_not_write_is_refused_by_name_before_anything_changes(ranks, tmp_path):
    """Names, links, types, numbers, dtypes, lengths and cover, each with right hashes; on both of two ranks."""
    ranks(2).run(save_steps, tmp_path / "step", 1)
    for results in ranks(2).run(load_edited, tmp_path / "step", list(STRUCTURES)):
        for (name, (_, part)), (kind, text, is_unchanged) in zip(STRUCTURES.items(), results, strict=True):
            assert kind == "CheckpointError" and is_unchanged, f"{name}: {kind or 'it loaded'} {text}, {is_unchanged=}"
            assert part in text, f"{name}: {text}"
