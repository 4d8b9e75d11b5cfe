"""Load a checkpoint: everything is checked first, then each rank reads its own ranges."""

from functools import partial
from typing import Any

import torch
from torch import nn

from zerolite.checkpoint.arguments import check_optimizer, model_and_folder
from zerolite.checkpoint.descriptions import describe, describe_pipeline, steps_here
from zerolite.checkpoint.extra_state import unpack
from zerolite.checkpoint.saved_files import SavedFolder
from zerolite.checkpoint.slices import buffers_of, entries_of, saved_names
from zerolite.checkpoint.structure import is_number
from zerolite.checkpoint.verify import verify
from zerolite.engine.engine import Engine, all_ranks, engine_of
from zerolite.errors import CheckpointError
from zerolite.optim.base import ShardedOptimizer
from zerolite.runtime import atomic_dir as files
from zerolite.runtime.rank_errors import on_all_ranks
from zerolite.shards.blocks import Block, copy, whole
from zerolite.shards.dtensors import local_of
from zerolite.shards.layout import Range


def load(model: nn.Module, folder, optimizer: ShardedOptimizer | None = None):
    """Load what `save` wrote, at any stage, mesh and world size; returns this rank's `extra`. Collective.

    Everything is checked, hashes and structure included, before anything changes, and read through the files that were
    hashed: a folder that is replaced meanwhile is loaded as it was, or refused. A rank beyond the saved world gets
    rank 0's extra and buffers. The old order (folder, model) still works, with a FutureWarning.

    Raises TypeError where the first two arguments are not a module and a path, and for an optimizer that is not
    zerolite's. Raises ValueError for a model that is not sharded, for an optimizer of another model, and inside
    `full_params`. Raises CheckpointError on every rank where the checkpoint is missing, incomplete, altered, of a newer
    format, or of another model or optimizer; nothing has changed then. One that says "is loaded in part" means that a
    rank could no longer read, or convert, what it had checked. Raises WorkerError where a worker failed.
    """
    model, folder = model_and_folder("load", model, folder)
    engine = engine_of(model)
    check_optimizer(engine, optimizer)
    if engine.full_depth > 0:
        raise ValueError("load changes what full_params has gathered: call it outside of `with zerolite.full_params`")
    ranks = all_ranks(engine)
    place = ranks.place()
    together = partial(on_all_ranks, ranks, f"loading {folder}", CheckpointError)
    together(lambda: files.restore(folder) if place[0] == 0 else None)
    with SavedFolder(folder) as saved:
        if len(set(together(saved.open))) > 1:
            raise CheckpointError(f"ranks see different checkpoints at {folder}: it was replaced meanwhile; load again")
        of_pipeline = describe_pipeline(engine, optimizer)
        extras: list[Any] = []

        def check() -> None:
            verify(engine, optimizer, saved, of_pipeline or describe(engine, optimizer), place)
            extras.append(unpack(*saved.extra_of_rank(place[0])))

        together(check)
        engine.before_step()
        filling = partial(on_all_ranks, ranks, f"{folder} is loaded in part, load again: reading it", CheckpointError)
        filling(lambda: _fill(engine, optimizer, saved, place[0]))
    for unit in engine.units:
        for bucket in unit.buckets:
            bucket.shard.publish()
            bucket.parameters.wait()
    if optimizer is not None:
        described = saved.manifest["optimizer"]
        _restore_optimizer(optimizer, {**described, "steps": steps_here(engine, described["steps"])})
    if engine.loss_scale is not None and saved.manifest["loss_scale"] is not None:
        engine.loss_scale.load_state_dict(saved.manifest["loss_scale"])
    return extras[0]


@torch.no_grad()
def _fill(engine: Engine, optimizer: ShardedOptimizer | None, saved: SavedFolder, rank: int) -> None:
    """Read this rank's ranges and buffers; what other ranks' ranges are gathered into is still the old."""
    names = saved_names(engine)
    for bucket, kind, slots, read, write in entries_of(engine, optimizer, saved.manifest.get("frozen", True)):
        owned, values = bucket.shard.range, read()
        for slot in slots:
            part = slot.range.intersect(owned)
            if part.numel > 0:
                block = slot.block or whole(slot.shape)
                key = f"{kind}/{names[slot.name]}"
                _read(saved, key, block, part.relative_to(slot.range), part.of(values, owned))
        write(values)
    for name, buffer in buffers_of(engine.model).items():
        handle = saved.of_buffer(rank, names[name])
        local_of(buffer).copy_(handle.get_tensor(f"buffer/{names[name]}"))


def _read(saved: SavedFolder, key: str, block: Block, wanted: Range, out: torch.Tensor) -> None:
    """out (numel,) = the wanted elements of a flattened block of a parameter or state, in out's dtype."""
    for (saved_block, elements), handle in saved.slices[key]:
        part = wanted.intersect(elements)
        if saved_block != block and saved_block.intersect(block) is not None:
            copy(out, (block, wanted), handle.get_slice(key)[:], (saved_block, elements))
        elif saved_block == block and part.numel > 0:
            part.of(out, wanted).copy_(part.of(handle.get_slice(key), elements))


def _restore_optimizer(optimizer: ShardedOptimizer, description: dict) -> None:
    """Param groups and steps, which were checked. A hyperparameter that is a tensor here gets its number in place."""
    for group, saved in zip(optimizer.param_groups, description["groups"], strict=True):
        for name, value in saved.items():
            here = group.get(name)
            if isinstance(here, torch.Tensor) and is_number(value):
                here.fill_(value)
            elif name != "params":
                group[name] = tuple(value) if isinstance(value, list) else value
    optimizer.set_steps(description["steps"])
