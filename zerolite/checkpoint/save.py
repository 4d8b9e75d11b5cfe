"""Checkpoints: one folder a step, each rank's own ranges as safetensors, a manifest with sizes and SHA-256.

    manifest.json            what the model is, how it was trained, size and hash of every file, and its own hash
    rank-00000.safetensors   1D slices "parameter/<name>", "exp_avg/<name>", ...; the rank's buffers and extra tensors
                             metadata: [start, stop) of every slice in its flat parameter; the rank's extra values;
                             the block (offsets, shape) of the whole tensor that a slice is of, where ranks of tensor
                             parallelism have one each

Slices are addressed by parameter, not by bucket or rank, so a checkpoint loads at any stage, mesh and world size. It is
written beside its place, synced, and appears by one rename; every decision to fail is taken by all ranks together.
No pickle is written or read.
"""

import contextlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import nn

from zerolite.checkpoint.about import about
from zerolite.checkpoint.arguments import check_optimizer, model_and_folder
from zerolite.checkpoint.descriptions import describe, describe_pipeline
from zerolite.checkpoint.extra_state import pack
from zerolite.checkpoint.manifest import is_complete, write_manifest
from zerolite.checkpoint.slices import buffers_of, saved_names, slices_of
from zerolite.engine.engine import Engine, all_ranks, engine_of
from zerolite.errors import CheckpointError
from zerolite.optim.base import ShardedOptimizer
from zerolite.runtime import atomic_dir as files
from zerolite.runtime import safetensors_file
from zerolite.runtime.rank_errors import on_all_ranks
from zerolite.shards.dtensors import local_of


def save(model: nn.Module, folder, optimizer: ShardedOptimizer | None = None, extra=None, frozen: bool = True) -> None:
    """Write parameters, persistent buffers, optimizer states and `extra` to `folder`. Collective.

    A checkpoint that stands there is replaced. The folder is one that all ranks see. Gradients are not saved.
    Beside other parallelisms it is one checkpoint of all ranks, which loads on another mesh, and on one process.
    extra: this rank's own values: nested dicts, lists and tuples of JSON values and tensors (scheduler, RNG, position
        in the data).
    frozen: False leaves frozen parameters out, which are most of a model with an adapter. `load` then keeps those that
        the model has, so build it on the same base again.

    The old order (folder, model) still works, with a FutureWarning.

    Raises TypeError where the first two arguments are not a module and a path, and for an optimizer that is not
    zerolite's. Raises ValueError for a model that is not sharded, and for an optimizer of another model. Raises
    CheckpointError on every rank where one cannot write: the disk is full, the folder holds something else than a
    checkpoint or is removed meanwhile, or `extra` holds what is neither JSON nor a tensor. Nothing new is left then,
    and what stood in the folder still stands. Raises WorkerError where a worker failed: half-stepped states are never
    saved.
    """
    model, folder = model_and_folder("save", model, folder)
    engine = engine_of(model)
    check_optimizer(engine, optimizer)
    ranks = all_ranks(engine)
    rank, _ = ranks.place()
    of_pipeline = describe_pipeline(engine, optimizer)
    together = partial(on_all_ranks, ranks, f"saving {folder}", CheckpointError)
    token = together(lambda: _prepare(engine, rank, folder))[0]
    written = files.beside(folder, token)
    try:
        path = written / f"rank-{rank:05d}.safetensors"
        written_files = together(lambda: _write_rank(engine, optimizer, extra, frozen, path))

        def commit() -> None:
            if rank == 0:
                told = dict(of_pipeline or describe(engine, optimizer))
                told |= about(engine, told.pop("dtypes"), told.pop("ties_away"))
                _commit(engine, {"frozen": frozen, **told}, written_files, written, folder)

        together(commit)
    except BaseException:  # Ctrl-C, and another rank that is gone, too
        if rank == 0:
            shutil.rmtree(written, ignore_errors=True)
        raise


def _prepare(engine: Engine, rank: int, folder: Path) -> str:
    engine.guard.check()
    token = uuid.uuid4().hex[:12]
    if rank == 0:
        if folder.exists() and not is_complete(folder) and any(folder.iterdir()):
            raise CheckpointError(f"{folder} exists and is no checkpoint: name a new folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        files.restore(folder)
        files.remove_leftovers(folder)
        files.beside(folder, token).mkdir()
    return token


def _write_rank(engine: Engine, optimizer: ShardedOptimizer | None, extra, frozen: bool, path: Path) -> str:
    """Stream this rank's file: what is decoded or copied from the device is held a bucket at a time."""
    slices: dict[str, list[int]] = {}
    blocks: dict[str, tuple] = {}
    entries: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
    reads: list[Callable[[], torch.Tensor]] = []
    for key, slot, elements, dtype, read in slices_of(engine, optimizer, frozen):
        slices[key] = [elements.start, elements.stop]
        if slot.block is not None:
            blocks[key] = slot.block
        entries.append((key, dtype, (elements.numel,)))
        reads.append(read)
    tensors: dict[str, torch.Tensor] = {}
    names = saved_names(engine)
    for name, buffer in buffers_of(engine.model).items():
        tensors[f"buffer/{names[name]}"] = local_of(buffer)
    metadata = {"slices": json.dumps(slices), "extra": json.dumps(pack(extra, "extra", tensors))}
    if blocks:
        metadata["blocks"] = json.dumps(blocks)
    entries += [(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()]
    reads += [tensor.detach for tensor in tensors.values()]
    with _kept(path.parent):
        safetensors_file.write_safetensors(path, entries, (read() for read in reads), metadata)
        files.sync_file(path)
        return f"{path.stat().st_size} {files.sha256_of(path)}"


@contextlib.contextmanager
def _kept(written: Path) -> Iterator[None]:
    """Inside, files below `written` are missing only where somebody has removed what rank 0 made."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{written} is gone, or not to be seen on this rank: save to a folder that all ranks see and no other "
            f"program saves to ({error})"
        ) from error


def _commit(engine: Engine, content: dict, written_files: list[str], written: Path, folder: Path) -> None:
    entries = {}
    for rank, size_and_digest in enumerate(written_files):
        size, digest = size_and_digest.split()
        entries[f"rank-{rank:05d}.safetensors"] = {"bytes": int(size), "sha256": digest}
    mesh = engine.mesh
    content = {
        "stage": engine.partition.stage,
        "world_size": len(written_files),
        "files": entries,
        **content,
        "loss_scale": engine.loss_scale.state_dict() if engine.loss_scale is not None else None,
    }
    if mesh.tensor or mesh.pipeline:
        content["mesh"] = {
            "data": [mesh.replicas.size, mesh.shard.size],
            "tensor": [one.group.size for one in mesh.tensor],
            "pipeline": [group.size for group in mesh.pipeline],
        }
    with _kept(written):
        write_manifest(written, content)
        files.commit_folder(written, folder)
