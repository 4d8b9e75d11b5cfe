"""Whether a checkpoint is whole, unaltered, and of this model and optimizer."""

import math

from zerolite.checkpoint.descriptions import Description
from zerolite.checkpoint.saved_files import SavedFolder
from zerolite.checkpoint.slices import buffers_of, entries_of, saved_names
from zerolite.checkpoint.structure import FLOATS, check_hyperparameters
from zerolite.engine.engine import Engine
from zerolite.errors import CheckpointError
from zerolite.optim.base import ShardedOptimizer
from zerolite.runtime.safetensors_file import DTYPES


def verify(
    engine: Engine,
    optimizer: ShardedOptimizer | None,
    saved_folder: SavedFolder,
    description: Description,
    place: tuple[int, int],
) -> None:
    """Everything that can be wrong; each rank hashes its share of the files, which are open afterwards.

    description: of the whole model here. place: this rank, and the number of ranks.
    """
    manifest, folder = saved_folder.manifest, saved_folder.folder
    for what in ("parameters", "buffers"):
        _compare(what.removesuffix("s"), manifest[what], description[what])
    if optimizer is not None:
        if manifest["optimizer"] is None:
            raise CheckpointError(f"{folder} holds no optimizer: load it without one")
        saved, here = manifest["optimizer"], description["optimizer"]
        if saved["class"] != here["class"]:
            raise CheckpointError(f"{folder} was saved with {saved['class']}, the optimizer here is {here['class']}")
        groups = [[sorted(group["params"]) for group in one["groups"]] for one in (saved, here)]
        if groups[0] != groups[1]:
            raise CheckpointError(
                f"{folder} has param groups of {[len(names) for names in groups[0]]} parameters, the optimizer here "
                f"{[len(names) for names in groups[1]]}, or other names in them: build it as the saved one was"
            )
        if saved["steps"].keys() != here["steps"].keys():
            names = sorted(saved["steps"].keys() ^ here["steps"].keys())
            raise CheckpointError(
                f"{folder} was saved with other parameters frozen: {', '.join(names[:4])} has optimizer states only "
                f"{'there' if names[0] in saved['steps'] else 'here'}; freeze the same before zerolite.shard"
            )
        check_hyperparameters(saved["groups"], optimizer.defaults)
    saved_folder.open_files(*place)
    _compare_tensors(engine, optimizer, saved_folder, place[0])


def _compare(what: str, saved: dict, here: dict) -> None:
    for name in [*saved, *here]:
        if saved.get(name) != here.get(name):
            raise CheckpointError(
                f"the checkpoint is of another model: {what} {name} is {saved.get(name, 'absent')} there and "
                f"{here.get(name, 'absent')} here"
            )


def _compare_tensors(engine: Engine, optimizer: ShardedOptimizer | None, saved: SavedFolder, rank: int) -> None:
    """Whether all that is to be read is there, and of dtypes that mean the same."""
    names = saved_names(engine)
    for bucket, kind, slots, _, _ in entries_of(engine, optimizer, saved.manifest["frozen"]):
        dtype = DTYPES[bucket.shard.spec.stepped_dtype]
        for slot in slots:
            key = f"{kind}/{names[slot.name]}"
            if key not in saved.slices and math.prod(slot.shape) > 0:
                raise CheckpointError(f"{saved.folder} holds no {key}: the checkpoint is incomplete, use another one")
            for _, handle in saved.slices.get(key, ()):
                _compare_dtypes(key, handle.get_slice(key).get_dtype(), dtype)
    for name, buffer in buffers_of(engine.model).items():
        key, handle = f"buffer/{names[name]}", saved.of_buffer(rank, names[name])
        _compare_dtypes(key, handle.get_slice(key).get_dtype(), DTYPES[buffer.dtype])


def _compare_dtypes(key: str, saved: str, here: str) -> None:
    if saved != here and not {saved, here} <= FLOATS:
        raise CheckpointError(
            f"{key} is {saved} in the checkpoint and {here} here: numbers of one are none of the other"
        )
