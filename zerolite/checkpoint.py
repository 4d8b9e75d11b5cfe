"""Checkpoints: one folder a step, each rank's own ranges as safetensors, a manifest with sizes and SHA-256.

    manifest.json            what the model is, how it was trained, size and hash of every file
    rank-00000.safetensors   1D slices "parameter/<name>", "exp_avg/<name>", ... and the rank's extra tensors
                             metadata: [start, stop) of every slice in its flat parameter; the rank's extra values

Slices are addressed by parameter, not by bucket or rank, so a checkpoint loads at any stage and world size. It is
written beside its place, synced, and appears by one rename; every decision to fail is taken by all ranks together.
No pickle is written or read.
"""

import json
import shutil
import uuid
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from zerolite import files
from zerolite.api import engine_of
from zerolite.errors import CheckpointError
from zerolite.optim.base import ShardedOptimizer
from zerolite.zero import Zero

MANIFEST = "manifest.json"
FORMAT = "zerolite-checkpoint"
VERSION = 1


def save(folder, model: nn.Module, optimizer: ShardedOptimizer | None = None, extra=None) -> None:
    """Write parameters, optimizer states and `extra` to `folder`; a checkpoint that stood there is replaced atomically.

    extra: this rank's own values: nested dicts and lists of JSON values and tensors (scheduler, RNG, position in the
    data). Gradients are not saved. Collective; the folder is one that all ranks see.
    CheckpointError on every rank where one cannot write.
    """
    zero = engine_of(model)
    folder = Path(folder).absolute()
    token = _agree(zero, "save", lambda: _prepare(zero, folder))[0]
    written = files.beside(folder, token)
    name = f"rank-{zero.rank:05d}.safetensors"
    try:
        facts = _agree(zero, "save", lambda: _write_rank(zero, optimizer, extra, written / name))
        _agree(zero, "save", lambda: _commit(zero, optimizer, facts, written, folder))
    except CheckpointError:
        if zero.rank == 0:
            shutil.rmtree(written, ignore_errors=True)
        raise


def load(folder, model: nn.Module, optimizer: ShardedOptimizer | None = None):
    """Load what `save` wrote, at any stage, mesh and world size; returns this rank's `extra`.

    Everything is checked, hashes included, before anything changes. A rank beyond the saved world gets rank 0's extra.
    Collective. CheckpointError where the checkpoint is missing, incomplete, altered, or of another model or optimizer.
    """
    zero = engine_of(model)
    folder = Path(folder).absolute()
    _agree(zero, "load", lambda: _verify(zero, optimizer, folder))
    manifest = read_manifest(folder)
    zero.before_step()
    with _Slices(folder, manifest) as slices:
        _fill(zero, optimizer, slices)
        extra = slices.extra(zero.rank if zero.rank < manifest["world_size"] else 0)
    if optimizer is not None:
        _restore_optimizer(optimizer, manifest["optimizer"])
    if zero.loss_scale is not None and manifest["loss_scale"] is not None:
        zero.loss_scale.load_state_dict(manifest["loss_scale"])
    return extra


def is_complete(folder) -> bool:
    """Whether `folder` holds a committed checkpoint; hashes are checked by `load`."""
    return (Path(folder) / MANIFEST).is_file()


def read_manifest(folder: Path) -> dict:
    """The manifest; CheckpointError where it is missing or not one of ours."""
    path = folder / MANIFEST
    if not path.is_file():
        what = "holds no manifest.json" if folder.is_dir() else "does not exist"
        raise CheckpointError(f"{folder} {what}, so it is no complete checkpoint: name one that zerolite.save wrote")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT or manifest["version"] > VERSION:
            raise CheckpointError(
                f"{path} is of format {manifest['format']} {manifest['version']}, this one reads {FORMAT} {VERSION}"
            )
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): use another checkpoint") from error
    return manifest


# Agreement #

MESSAGE_BYTES = 512


def _agree(zero: Zero, verb: str, work) -> list[str]:
    """Run `work()` on this rank; its short text from every rank, or CheckpointError on all where one failed."""
    try:
        result, failed = work() or "", 0.0
    except (OSError, SafetensorError, CheckpointError, TypeError, ValueError) as error:
        result, failed = f"{type(error).__name__}: {error}", 1.0
    text = result.encode()[:MESSAGE_BYTES]
    facts = [failed, float(len(text)), *map(float, text), *[0.0] * (MESSAGE_BYTES - len(text))]
    rows = zero.gather_facts(torch.tensor(facts, dtype=torch.float64)).view(-1, len(facts)).tolist()
    texts = [bytes(map(int, row[2 : 2 + int(row[1])])).decode(errors="replace") for row in rows]
    failures = [f"rank {rank}: {text}" for rank, (row, text) in enumerate(zip(rows, texts, strict=True)) if row[0]]
    if failures:
        raise CheckpointError(f"{verb} failed on {len(failures)} of {len(rows)} ranks; " + "; ".join(failures[:4]))
    return texts


# Writing #


def _prepare(zero: Zero, folder: Path) -> str:
    token = uuid.uuid4().hex[:12]
    if zero.rank == 0:
        if folder.exists() and not is_complete(folder) and any(folder.iterdir()):
            raise CheckpointError(f"{folder} exists and is no checkpoint: name a new folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        files.remove_leftovers(folder)
        files.beside(folder, token).mkdir()
    return token


def _states_of(zero: Zero, optimizer: ShardedOptimizer | None):
    """(key, slot name, start, stop, 1D values) of everything that this rank is the one to save."""
    if zero.replicate_group.rank != 0:
        return
    for unit in zero.units:
        for bucket in unit.buckets:
            low, high = bucket.layout.piece(zero.shard_group.rank)  # its piece, also where it owns all
            flat = bucket.flat
            kinds = {"parameter": flat.stepped, **(optimizer.states_of(bucket) if optimizer is not None else {})}
            for slot in bucket.layout.slots:
                first, last = bucket.layout.overlap(slot, low, high)
                for kind, values in kinds.items() if first < last else ():
                    yield (
                        f"{kind}/{slot.name}",
                        first - slot.offset,
                        last - slot.offset,
                        values[first - flat.start : last - flat.start],
                    )


def _write_rank(zero: Zero, optimizer: ShardedOptimizer | None, extra, path: Path) -> str:
    tensors: dict[str, torch.Tensor] = {}
    slices: dict[str, list[int]] = {}
    for key, start, stop, values in _states_of(zero, optimizer):
        tensors[key] = values.detach().cpu()
        slices[key] = [start, stop]
    metadata = {"slices": json.dumps(slices), "extra": json.dumps(_pack(extra, "extra", tensors))}
    save_file(tensors, path, metadata=metadata)
    files.sync_file(path)
    return f"{path.stat().st_size} {files.sha256_of(path)}"


def _commit(zero: Zero, optimizer: ShardedOptimizer | None, facts: list[str], written: Path, folder: Path) -> None:
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
        "files": entries,
        "parameters": _parameters_of(zero),
        "optimizer": optimizer.describe() if optimizer is not None else None,
        "loss_scale": zero.loss_scale.state_dict() if zero.loss_scale is not None else None,
    }
    path = written / MANIFEST
    path.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    files.sync_file(path)
    files.commit_folder(written, folder)


def _parameters_of(zero: Zero) -> dict[str, list[int]]:
    slots = [slot for unit in zero.units for bucket in unit.buckets for slot in bucket.layout.slots]
    return {slot.name: list(slot.shape) for slot in slots}


def _pack(value, key: str, tensors: dict[str, torch.Tensor]):
    """`value` as JSON; its tensors go to `tensors` and leave {"tensor": key}. Dicts and tuples are tagged."""
    if isinstance(value, torch.Tensor):
        tensors[key] = value.detach().cpu().contiguous().clone()
        return {"tensor": key}
    if isinstance(value, dict):
        if not all(isinstance(name, str) for name in value):
            raise TypeError(f"{key}: keys of dicts in extra are strings, got {list(value)[:4]}")
        return {"dict": {name: _pack(item, f"{key}/{name}", tensors) for name, item in value.items()}}
    if isinstance(value, list | tuple):
        items = [_pack(item, f"{key}/{index}", tensors) for index, item in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": items}
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"{key}: extra holds JSON values and tensors, got {type(value).__name__}")


def _unpack(value, tensors):
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    if tag == "tensor":
        return tensors.get_tensor(content)
    if tag == "dict":
        return {name: _unpack(item, tensors) for name, item in content.items()}
    items = [_unpack(item, tensors) for item in content]
    return items if tag == "list" else tuple(items)


# Reading #


def _verify(zero: Zero, optimizer: ShardedOptimizer | None, folder: Path) -> None:
    """Everything that can be wrong; each rank hashes its share of the files."""
    manifest = read_manifest(folder)
    _compare("parameters", manifest["parameters"], _parameters_of(zero))
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

    def extra(self, rank: int):
        handle = self.handles[rank]
        return _unpack(json.loads(handle.metadata()["extra"]), handle)


@torch.no_grad()
def _fill(zero: Zero, optimizer: ShardedOptimizer | None, slices: _Slices) -> None:
    for unit in zero.units:
        for bucket in unit.buckets:
            flat = bucket.flat
            kinds = {"parameter": flat.stepped, **(optimizer.states_of(bucket) if optimizer is not None else {})}
            for slot in bucket.layout.slots:
                first, last = bucket.layout.overlap(slot, flat.start, flat.stop)
                for kind, values in kinds.items() if first < last else ():
                    out = values[first - flat.start : last - flat.start]
                    slices.read(f"{kind}/{slot.name}", first - slot.offset, last - slot.offset, out)
            flat.refresh_from_master()
            flat.republish()
            flat.wait()


def _restore_optimizer(optimizer: ShardedOptimizer, description: dict) -> None:
    for group, saved in zip(optimizer.param_groups, description["groups"], strict=True):
        hyper = {name: value for name, value in saved.items() if name != "params"}
        group.update({name: tuple(value) if isinstance(value, list) else value for name, value in hyper.items()})
    optimizer.set_steps(description["steps"])
