"""Whether a checkpoint is whole, unaltered, and of this model and optimizer."""

from pathlib import Path

from zerolite.checkpoint.manifest import read_manifest
from zerolite.checkpoint.slices import shapes_of
from zerolite.engine.engine import Engine
from zerolite.errors import CheckpointError
from zerolite.optim.base import ShardedOptimizer
from zerolite.runtime import atomic_dir as files


def verify(engine: Engine, optimizer: ShardedOptimizer | None, folder: Path) -> None:
    """Everything that can be wrong; each rank hashes its share of the files."""
    manifest = read_manifest(folder)
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
    for index, (name, entry) in enumerate(sorted(manifest["files"].items())):
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: the checkpoint is incomplete, use another one")
        if path.stat().st_size != entry["bytes"]:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes, the manifest says {entry['bytes']}: it was truncated or "
                "altered, use another checkpoint"
            )
        if index % engine.mesh.world_size == engine.mesh.rank and files.sha256_of(path) != entry["sha256"]:
            raise CheckpointError(f"{path} was altered (its SHA-256 is not the manifest's): use another checkpoint")


def _compare(what: str, saved: dict, here: dict) -> None:
    for name in [*saved, *here]:
        if saved.get(name) != here.get(name):
            raise CheckpointError(
                f"the checkpoint is of another model: {what} {name} is {saved.get(name, 'absent')} there and "
                f"{here.get(name, 'absent')} here"
            )
