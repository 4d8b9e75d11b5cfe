"""Whether a checkpoint is whole, unaltered, and of this model and optimizer."""

import math

from zerolite.checkpoint.saved_files import SavedFolder
from zerolite.checkpoint.slices import buffers_of, entries_of, shapes_of
from zerolite.checkpoint.structure import FLOATS, check_hyperparameters
from zerolite.engine.engine import Engine
from zerolite.errors import CheckpointError
from zerolite.optim.base import ShardedOptimizer
from zerolite.runtime.safetensors_file import DTYPES


def verify(engine: Engine, optimizer: ShardedOptimizer | None, saved_folder: SavedFolder) -> None:
    """Everything that can be wrong; each rank hashes its share of the files, which are open afterwards."""
    manifest, folder = saved_folder.manifest, saved_folder.folder
    for what, shapes in shapes_of(engine).items():
        _compare(what.removesuffix("s"), manifest[what], shapes)
    if optimizer is not None:
        if manifest["optimizer"] is None:
            raise CheckpointError(f"{folder} holds no optimizer: load it without one")
        saved, here = manifest["optimizer"], optimizer.describe()
        if saved["class"] != here["class"]:
            raise CheckpointError(f"{folder} was saved with {saved['class']}, the optimizer here is {here['class']}")
        groups = [[group["params"] for group in description["groups"]] for description in (saved, here)]
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
    saved_folder.open_files(engine.mesh.rank, engine.mesh.world_size)
    _compare_tensors(engine, optimizer, saved_folder)


def _compare(what: str, saved: dict, here: dict) -> None:
    for name in [*saved, *here]:
        if saved.get(name) != here.get(name):
            raise CheckpointError(
                f"the checkpoint is of another model: {what} {name} is {saved.get(name, 'absent')} there and "
                f"{here.get(name, 'absent')} here"
            )


def _compare_tensors(engine: Engine, optimizer: ShardedOptimizer | None, saved: SavedFolder) -> None:
    """Whether all that is to be read is there, and of dtypes that mean the same."""
    for bucket, kind, slots, _, _ in entries_of(engine, optimizer, saved.manifest["frozen"]):
        dtype = DTYPES[bucket.shard.spec.stepped_dtype]
        for slot in slots:
            key = f"{kind}/{slot.name}"
            if key not in saved.slices and math.prod(slot.shape) > 0:
                raise CheckpointError(f"{saved.folder} holds no {key}: the checkpoint is incomplete, use another one")
            for _, handle in saved.slices.get(key, ()):
                _compare_dtypes(key, handle.get_slice(key).get_dtype(), dtype)
    handle = saved.of_rank(engine.mesh.rank)
    for name, buffer in buffers_of(engine.model).items():
        _compare_dtypes(f"buffer/{name}", handle.get_slice(f"buffer/{name}").get_dtype(), DTYPES[buffer.dtype])


def _compare_dtypes(key: str, saved: str, here: str) -> None:
    if saved != here and not {saved, here} <= FLOATS:
        raise CheckpointError(
            f"{key} is {saved} in the checkpoint and {here} here: numbers of one are none of the other"
        )
