"""Checkpoints: one folder a step, each rank's own ranges as safetensors, a manifest with sizes and SHA-256.

    manifest.json            what the model is, how it was trained, size and hash of every file, and its own hash
    rank-00000.safetensors   1D slices "parameter/<name>", "exp_avg/<name>", ...; the rank's buffers and extra tensors
                             metadata: [start, stop) of every slice in its flat parameter; the rank's extra values

Slices are addressed by parameter, not by bucket or rank, so a checkpoint loads at any stage and world size. It is
written beside its place, synced, and appears by one rename; every decision to fail is taken by all ranks together.
No pickle is written or read.
"""

import hashlib
import json
import shutil
import uuid
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from zerolite.api import engine_of
from zerolite.checkpoint.extra_state import pack, unpack
from zerolite.engine.engine import Zero
from zerolite.errors import CheckpointError
from zerolite.optim.base import ShardedOptimizer
from zerolite.runtime import atomic_dir as files
from zerolite.runtime.rank_errors import on_all_ranks

MANIFEST = "manifest.json"
FORMAT = "zerolite-checkpoint"
VERSION = 1
NO_DIGEST = b"0" * 64  # stands in the manifest for its own hash while that is taken


def save(folder, model: nn.Module, optimizer: ShardedOptimizer | None = None, extra=None, frozen: bool = True) -> None:
    """Write parameters, persistent buffers, optimizer states and `extra` to `folder`, replacing a checkpoint there.

    extra: this rank's own values: nested dicts, lists and tuples of JSON values and tensors (scheduler, RNG, position
    in the data). frozen=False leaves frozen parameters out, which are most of a model with an adapter: `load` then
    keeps those that the model has, so build it on the same base again. Gradients are not saved. Collective; the folder
    is one that all ranks see. CheckpointError on every rank where one cannot write; then nothing is left and what stood
    there still stands.
    """
    zero = engine_of(model)
    _check_optimizer(zero, optimizer)
    zero.settle()
    folder = Path(folder).resolve()
    together = partial(on_all_ranks, zero, f"saving {folder}", CheckpointError)
    token = together(lambda: _prepare(zero, folder))[0]
    written = files.beside(folder, token)
    try:
        path = written / f"rank-{zero.rank:05d}.safetensors"
        facts = together(lambda: _write_rank(zero, optimizer, extra, frozen, path))
        together(lambda: _commit(zero, optimizer, facts, frozen, written, folder))
    except CheckpointError:
        if zero.rank == 0:
            shutil.rmtree(written, ignore_errors=True)
        raise


def load(folder, model: nn.Module, optimizer: ShardedOptimizer | None = None):
    """Load what `save` wrote, at any stage, mesh and world size; returns this rank's `extra`.

    Everything is checked, hashes included, before anything changes. A rank beyond the saved world gets rank 0's extra
    and buffers. Collective. CheckpointError on every rank where the checkpoint is missing, incomplete, altered, or of
    another model or optimizer.
    """
    zero = engine_of(model)
    _check_optimizer(zero, optimizer)
    if zero.full_depth > 0:
        raise ValueError("load changes what full_params has gathered: call it outside of `with zerolite.full_params`")
    zero.settle()
    folder = Path(folder).resolve()
    together = partial(on_all_ranks, zero, f"loading {folder}", CheckpointError)
    together(lambda: files.restore(folder) if zero.rank == 0 else None)
    together(lambda: _verify(zero, optimizer, folder))
    manifest = read_manifest(folder)
    zero.before_step()
    with _Slices(folder, manifest) as slices:
        together(lambda: _fill(zero, optimizer, slices, manifest.get("frozen", True)))
        extra = slices.extra(zero.rank)
    for unit in zero.units:
        for bucket in unit.buckets:
            bucket.flat.republish()
            bucket.flat.wait()
    if optimizer is not None:
        _restore_optimizer(optimizer, manifest["optimizer"])
    if zero.loss_scale is not None and manifest["loss_scale"] is not None:
        zero.loss_scale.load_state_dict(manifest["loss_scale"])
    return extra


def _check_optimizer(zero: Zero, optimizer) -> None:
    if not isinstance(optimizer, ShardedOptimizer | None):
        raise TypeError(f"checkpoints take a zerolite optimizer, got {type(optimizer).__name__}")
    groups = optimizer.param_groups if optimizer is not None else []
    if any(parameter._zerolite_place[0] is not zero for group in groups for parameter in group["params"]):
        raise ValueError("the optimizer is of another model: give the one that was built on this model's parameters")


def is_complete(folder) -> bool:
    """Whether `folder` holds a committed checkpoint; hashes are checked by `load`."""
    return (Path(folder) / MANIFEST).is_file()


def read_manifest(folder: Path) -> dict:
    """The manifest; CheckpointError where it is missing or not one of ours."""
    path = folder / MANIFEST
    if not path.is_file():
        what = "holds no manifest.json" if folder.is_dir() else "does not exist"
        raise CheckpointError(f"{folder} {what}, so it is no complete checkpoint: name one that zerolite.save wrote")
    data = path.read_bytes()
    try:
        manifest = json.loads(data)
        if manifest["format"] != FORMAT or manifest["version"] > VERSION:
            raise CheckpointError(
                f"{path} is of format {manifest['format']} {manifest['version']}, this one reads {FORMAT} {VERSION}"
            )
        digest = manifest["sha256"].encode()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): use another checkpoint") from error
    if data.count(digest) != 1 or hashlib.sha256(data.replace(digest, NO_DIGEST)).hexdigest().encode() != digest:
        raise CheckpointError(f"{path} was altered (its own SHA-256 does not hold): use another checkpoint")
    return manifest


# Writing #


def _prepare(zero: Zero, folder: Path) -> str:
    token = uuid.uuid4().hex[:12]
    if zero.rank == 0:
        if folder.exists() and not is_complete(folder) and any(folder.iterdir()):
            raise CheckpointError(f"{folder} exists and is no checkpoint: name a new folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        files.restore(folder)
        files.remove_leftovers(folder)
        files.beside(folder, token).mkdir()
    return token


def _flats_of(zero: Zero, optimizer: ShardedOptimizer | None, frozen: bool):
    """(bucket, kind, read, the slots that have it) of parameters and of every state; see `_put_back`.

    `read()` gives this rank's 1D range; where the host encodes it, it is decoded then, after waiting for the workers.
    """
    for unit in zero.units:
        for bucket in unit.buckets:
            if bucket.gradients is None and not frozen:
                continue
            slots = list(zip(bucket.layout.slots, bucket.flat.parameters, strict=True))
            yield bucket, "parameter", bucket.flat.values, [slot for slot, _ in slots]
            stepped = [slot for slot, parameter in slots if optimizer is not None and parameter in optimizer.state]
            for kind in optimizer.rule.state_names if stepped else ():
                yield bucket, kind, partial(optimizer.read_state, bucket, kind), stepped


def _put_back(optimizer: ShardedOptimizer | None, bucket, kind: str, values: torch.Tensor) -> None:
    if kind == "parameter":
        bucket.flat.set_values(values)
    else:
        optimizer.write_state(bucket, kind, values)


def _slices_of(zero: Zero, optimizer: ShardedOptimizer | None, frozen: bool):
    """(key, start, stop, dtype, read) of everything that this rank is the one to save; `read()` gives 1D values."""
    if zero.replicate_group.rank != 0:
        return
    for bucket, kind, read, slots in _flats_of(zero, optimizer, frozen):
        flat = bucket.flat
        low, high = bucket.layout.piece(zero.shard_group.rank)  # its piece, also where it owns all
        held: list[torch.Tensor] = []  # decoded once for all slots, and dropped with the last
        here = [(slot, *bucket.layout.overlap(slot, low, high)) for slot in slots]
        here = [(slot, first, last) for slot, first, last in here if first < last]
        for slot, first, last in here:

            def read_slot(read=read, held=held, flat=flat, first=first, last=last, is_last=slot is here[-1][0]):
                if not held:
                    held.append(read())
                values = held[0][first - flat.start : last - flat.start]
                if is_last:
                    held.clear()
                return values

            yield f"{kind}/{slot.name}", first - slot.offset, last - slot.offset, flat.stepped_dtype, read_slot


def buffers_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's persistent buffers, those that a state dict holds."""
    return {
        name: buffer
        for name, buffer in model.named_buffers()
        if name.rpartition(".")[2] not in model.get_submodule(name.rpartition(".")[0])._non_persistent_buffers_set
    }


def _write_rank(zero: Zero, optimizer: ShardedOptimizer | None, extra, frozen: bool, path: Path) -> str:
    """Stream this rank's file: what is decoded or copied from the device is held a bucket at a time."""
    slices, entries, reads = {}, [], []
    for key, start, stop, dtype, read in _slices_of(zero, optimizer, frozen):
        slices[key] = [start, stop]
        entries.append((key, dtype, (stop - start,)))
        reads.append(read)
    tensors: dict[str, torch.Tensor] = {}
    for name, buffer in buffers_of(zero.model).items():
        tensors[f"buffer/{name}"] = buffer
    metadata = {"slices": json.dumps(slices), "extra": json.dumps(pack(extra, "extra", tensors))}
    entries += [(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()]
    reads += [lambda tensor=tensor: tensor for tensor in tensors.values()]
    files.write_safetensors(path, entries, (read() for read in reads), metadata)
    files.sync_file(path)
    return f"{path.stat().st_size} {files.sha256_of(path)}"


def _commit(
    zero: Zero, optimizer: ShardedOptimizer | None, facts: list[str], frozen: bool, written: Path, folder: Path
) -> None:
    if zero.rank != 0:
        return
    entries = {}
    for rank, fact in enumerate(facts):
        size, digest = fact.split()
        entries[f"rank-{rank:05d}.safetensors"] = {"bytes": int(size), "sha256": digest}
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "stage": zero.stage,
        "world_size": len(facts),
        "frozen": frozen,
        "files": entries,
        **_shapes_of(zero),
        "optimizer": optimizer.describe() if optimizer is not None else None,
        "loss_scale": zero.loss_scale.state_dict() if zero.loss_scale is not None else None,
        "sha256": NO_DIGEST.decode(),
    }
    data = json.dumps(manifest, indent=1).encode()
    path = written / MANIFEST
    path.write_bytes(data.replace(NO_DIGEST, hashlib.sha256(data).hexdigest().encode()))
    files.sync_file(path)
    files.commit_folder(written, folder)


def _shapes_of(zero: Zero) -> dict[str, dict[str, list[int]]]:
    slots = [slot for unit in zero.units for bucket in unit.buckets for slot in bucket.layout.slots]
    return {
        "parameters": {slot.name: list(slot.shape) for slot in slots},
        "buffers": {name: list(buffer.shape) for name, buffer in buffers_of(zero.model).items()},
    }


# Reading #


def _verify(zero: Zero, optimizer: ShardedOptimizer | None, folder: Path) -> None:
    """Everything that can be wrong; each rank hashes its share of the files."""
    manifest = read_manifest(folder)
    for what, shapes in _shapes_of(zero).items():
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
        if index % zero.world_size == zero.rank and files.sha256_of(path) != entry["sha256"]:
            raise CheckpointError(f"{path} was altered (its SHA-256 is not the manifest's): use another checkpoint")


def _compare(what: str, saved: dict, here: dict) -> None:
    for name in [*saved, *here]:
        if saved.get(name) != here.get(name):
            raise CheckpointError(
                f"the checkpoint is of another model: {what} {name} is {saved.get(name, 'absent')} there and "
                f"{here.get(name, 'absent')} here"
            )


class _Slices:
    """All slices of a checkpoint, addressed by key and element."""

    def __init__(self, folder: Path, manifest: dict):
        self.handles = [safe_open(folder / name, framework="pt") for name in sorted(manifest["files"])]
        self.index: dict[str, list[tuple[int, int, object]]] = {}
        for handle in self.handles:
            for key, (start, stop) in json.loads(handle.metadata()["slices"]).items():
                self.index.setdefault(key, []).append((start, stop, handle))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for handle in self.handles:
            handle.__exit__(*exception)

    def read(self, key: str, start: int, stop: int, out: torch.Tensor) -> None:
        """out (stop - start,) = elements [start, stop) of a flat parameter or state, in out's dtype."""
        covered = 0
        for low, high, handle in self.index.get(key, ()):
            first, last = max(low, start), min(high, stop)
            if first < last:
                out[first - start : last - start].copy_(handle.get_slice(key)[first - low : last - low])
                covered += last - first
        if covered != stop - start:
            raise CheckpointError(f"{key} has {covered} of the elements [{start}, {stop}) in the checkpoint")

    def of_rank(self, rank: int):
        """A rank's own file, or rank 0's for one beyond the saved world."""
        return self.handles[rank if rank < len(self.handles) else 0]

    def extra(self, rank: int):
        handle = self.of_rank(rank)
        return unpack(json.loads(handle.metadata()["extra"]), handle)


@torch.no_grad()
def _fill(zero: Zero, optimizer: ShardedOptimizer | None, slices: _Slices, frozen: bool) -> None:
    """Read this rank's ranges and buffers; what other ranks' ranges are gathered into is still the old."""
    for bucket, kind, read, slots in _flats_of(zero, optimizer, frozen):
        values = read()
        for slot in slots:
            first, last = bucket.layout.overlap(slot, bucket.flat.start, bucket.flat.stop)
            if first < last:
                out = values[first - bucket.flat.start : last - bucket.flat.start]
                slices.read(f"{kind}/{slot.name}", first - slot.offset, last - slot.offset, out)
        _put_back(optimizer, bucket, kind, values)
    handle = slices.of_rank(zero.rank)
    for name, buffer in buffers_of(zero.model).items():
        buffer.copy_(handle.get_tensor(f"buffer/{name}"))


def _restore_optimizer(optimizer: ShardedOptimizer, description: dict) -> None:
    for group, saved in zip(optimizer.param_groups, description["groups"], strict=True):
        hyper = {name: value for name, value in saved.items() if name != "params"}
        group.update({name: tuple(value) if isinstance(value, list) else value for name, value in hyper.items()})
    optimizer.set_steps(description["steps"])
