"""Load a checkpoint: everything is checked first, then each rank reads its own ranges."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from zerolite.checkpoint.arguments import check_optimizer, model_and_folder
from zerolite.checkpoint.extra_state import unpack
from zerolite.checkpoint.manifest import read_manifest
from zerolite.checkpoint.slices import buffers_of, entries_of
from zerolite.checkpoint.verify import verify
from zerolite.engine.engine import Engine, engine_of
from zerolite.errors import CheckpointError
from zerolite.optim.base import ShardedOptimizer
from zerolite.runtime import atomic_dir as files
from zerolite.runtime.rank_errors import on_all_ranks
from zerolite.shards.layout import Range


def load(model: nn.Module, folder, optimizer: ShardedOptimizer | None = None):
    """Load what `save` wrote, at any stage, mesh and world size; returns this rank's `extra`. Collective.

    Everything is checked, hashes included, before anything changes. A rank beyond the saved world gets rank 0's extra
    and buffers. The old order (folder, model) still works, with a FutureWarning.

    Raises TypeError where the first two arguments are not a module and a path, and for an optimizer that is not
    zerolite's. Raises ValueError for a model that is not sharded, for an optimizer of another model, and inside
    `full_params`. Raises CheckpointError on every rank where the checkpoint is missing, incomplete, altered, of a newer
    format, or of another model or optimizer; nothing has changed then. Raises WorkerError where a worker failed.
    """
    model, folder = model_and_folder("load", model, folder)
    engine = engine_of(model)
    check_optimizer(engine, optimizer)
    if engine.full_depth > 0:
        raise ValueError("load changes what full_params has gathered: call it outside of `with zerolite.full_params`")
    together = partial(on_all_ranks, engine, f"loading {folder}", CheckpointError)
    together(lambda: files.restore(folder) if engine.mesh.rank == 0 else None)
    together(lambda: verify(engine, optimizer, folder))
    manifest = read_manifest(folder)
    engine.before_step()
    with _Slices(folder, manifest) as slices:
        together(lambda: _fill(engine, optimizer, slices, manifest.get("frozen", True)))
        extra = slices.extra(engine.mesh.rank)
    for unit in engine.units:
        for bucket in unit.buckets:
            bucket.shard.publish()
            bucket.parameters.wait()
    if optimizer is not None:
        _restore_optimizer(optimizer, manifest["optimizer"])
    if engine.loss_scale is not None and manifest["loss_scale"] is not None:
        engine.loss_scale.load_state_dict(manifest["loss_scale"])
    return extra


class _Slices:
    """All slices of a checkpoint, addressed by key and element."""

    def __init__(self, folder: Path, manifest: dict):
        self.handles = [safe_open(folder / name, framework="pt") for name in sorted(manifest["files"])]
        self.index: dict[str, list[tuple[Range, Any]]] = {}
        for handle in self.handles:
            for key, (start, stop) in json.loads(handle.metadata()["slices"]).items():
                self.index.setdefault(key, []).append((Range(start, stop), handle))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for handle in self.handles:
            handle.__exit__(*exception)

    def read(self, key: str, wanted: Range, out: torch.Tensor) -> None:
        """out (numel,) = the wanted elements of a flat parameter or state, in out's dtype."""
        covered = 0
        for saved, handle in self.index.get(key, ()):
            part = wanted.intersect(saved)
            if part.numel > 0:
                part.of(out, wanted).copy_(part.of(handle.get_slice(key), saved))
                covered += part.numel
        if covered != wanted.numel:
            raise CheckpointError(
                f"{key} has {covered} of the elements [{wanted.start}, {wanted.stop}) in the checkpoint"
            )

    def of_rank(self, rank: int):
        """A rank's own file, or rank 0's for one beyond the saved world."""
        return self.handles[rank if rank < len(self.handles) else 0]

    def extra(self, rank: int):
        handle = self.of_rank(rank)
        return unpack(json.loads(handle.metadata()["extra"]), handle)


@torch.no_grad()
def _fill(engine: Engine, optimizer: ShardedOptimizer | None, slices: _Slices, frozen: bool) -> None:
    """Read this rank's ranges and buffers; what other ranks' ranges are gathered into is still the old."""
    for bucket, kind, slots, read, write in entries_of(engine, optimizer, frozen):
        owned, values = bucket.shard.range, read()
        for slot in slots:
            part = slot.range.intersect(owned)
            if part.numel > 0:
                slices.read(f"{kind}/{slot.name}", part.relative_to(slot.range), part.of(values, owned))
        write(values)
    handle = slices.of_rank(engine.mesh.rank)
    for name, buffer in buffers_of(engine.model).items():
        buffer.copy_(handle.get_tensor(f"buffer/{name}"))


def _restore_optimizer(optimizer: ShardedOptimizer, description: dict) -> None:
    for group, saved in zip(optimizer.param_groups, description["groups"], strict=True):
        hyper = {name: value for name, value in saved.items() if name != "params"}
        group.update({name: tuple(value) if isinstance(value, list) else value for name, value in hyper.items()})
    optimizer.set_steps(description["steps"])
