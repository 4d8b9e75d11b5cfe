"""Is a checkpoint with any mutation refused whole, or are the values loaded that its files say?

Half of the mutations are of bytes and files, which hashes find; half are of what the files say, signed again, so that
only their structure can tell. What a checkpoint says is read here without zerolite.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from resigned import join, resign, split, unchanged
from saved import attempt, full, make, state, train
from torch import Tensor

import zerolite

FILES = ["rank-00000.safetensors", "rank-00001.safetensors"]
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
}  # fmt: skip
DONE_AGAIN = 4  # of so many that load, one takes a step
ABSENT = object()

# of what is said

VALUES = [
    None,
    True,
    -1,
    0,
    1,
    7,
    2**31,
    2**63,
    10**400,
    0.5,
    -0.0,
    float("nan"),
    float("inf"),
    "",
    "x",
    [],
    {},
    [0],
    [[]],
]


def mutate(value, draw: random.Random):
    """Another value at one random place of a JSON value: replaced, removed, doubled, or a number moved a little."""
    if isinstance(value, dict | list) and value and draw.random() < 0.85:
        copy = dict(value) if isinstance(value, dict) else list(value)
        key = draw.choice(list(copy)) if isinstance(copy, dict) else draw.randrange(len(copy))
        action = draw.random()
        if action < 0.75:
            copy[key] = mutate(copy[key], draw)
        elif action < 0.9:
            del copy[key]
        elif isinstance(copy, dict):
            copy[str(draw.choice([*copy, "../x", "a" * 300]))] = copy[key]
        else:
            copy.append(copy[key])
        return copy
    if isinstance(value, int) and not isinstance(value, bool) and draw.random() < 0.5:
        return value + draw.choice([-8, -1, 1, 8])
    return draw.choice(VALUES)


def resigned(folder: Path, draw: random.Random) -> None:
    """Another value in the manifest, in a file's slices or extra, in what it says of its tensors, or in a tensor."""
    path = folder / draw.choice(FILES)
    where = draw.choice(["manifest", "optimizer", "slices", "shift", "extra", "tensors", "numbers"])
    manifest = json.loads((folder / "manifest.json").read_text())
    if where == "manifest":
        manifest = mutate(manifest, draw)
    elif where == "optimizer":  # what a user could have chosen
        optimizer = manifest["optimizer"]
        group = draw.choice(optimizer["groups"])
        group[draw.choice(["lr", "eps", "weight_decay"])] = draw.random()
        group["betas"] = [draw.random(), draw.random()]
        optimizer["steps"][draw.choice(list(optimizer["steps"]))] = draw.randrange(1 << 20)
    else:
        header, body = split(path)
        if where == "tensors":
            mutated = mutate({key: entry for key, entry in header.items() if key != "__metadata__"}, draw)
            header = {"__metadata__": header["__metadata__"], **mutated} if isinstance(mutated, dict) else mutated
        elif where == "numbers":
            body = bytearray(body)
            body[draw.randrange(len(body))] ^= 1 << draw.randrange(8)
        elif where == "shift":
            slices, by = json.loads(header["__metadata__"]["slices"]), draw.choice([-8, -1, 1, 8])
            key = draw.choice(list(slices))
            slices[key] = [end + by for end in slices[key]]
            header["__metadata__"]["slices"] = json.dumps(slices)
        else:
            header["__metadata__"][where] = json.dumps(mutate(json.loads(header["__metadata__"][where]), draw))
        join(path, header, bytes(body))
    if isinstance(manifest, dict):
        resign(folder, manifest)
    else:
        (folder / "manifest.json").write_text(json.dumps(manifest))


# of bytes and files


def unsigned(folder: Path, draw: random.Random) -> None:
    """A file is damaged, cut, lengthened, lost, doubled, or another one's; its hash is what it was."""
    path = folder / draw.choice([*FILES, "manifest.json"])
    data = bytearray(path.read_bytes())
    at, length = draw.randrange(len(data)), draw.randint(1, 40)
    other = folder / draw.choice(FILES)
    action = draw.choice(
        ["flip", "set", "delete", "insert", "cut", "zero", "swap", "append", "lose", "copy", "several"]
    )
    if action == "lose":
        path.unlink()
        return
    if action == "copy":
        shutil.copyfile(other, path) if other != path else shutil.copyfile(folder / "manifest.json", path)
        return
    if action == "flip":
        data[at] ^= 1 << draw.randrange(8)
    elif action == "set":
        data[at] = draw.randrange(256)
    elif action == "delete":
        del data[at : at + length]
    elif action == "insert":
        data[at:at] = draw.randbytes(length)
    elif action == "cut":
        del data[at:]
    elif action == "zero":
        data[at : at + length] = bytes(len(data[at : at + length]))
    elif action == "swap":
        to = draw.randrange(len(data))
        data[at], data[to] = data[to], data[at]
    elif action == "append":
        data += draw.randbytes(length)
    else:
        for _ in range(length):
            data[draw.randrange(len(data))] = draw.randrange(256)
    path.write_bytes(data)


# what a checkpoint says, and what a model has


def said(folder: Path) -> dict[str, object]:
    """By name: parameters and states whole and flat, rank 0's buffers and extra, numbers of the optimizer."""
    manifest = json.loads((folder / "manifest.json").read_text())
    found: dict[str, object] = {}
    for file in FILES[: manifest["world_size"]]:
        header, body = split(folder / file)
        metadata = header.pop("__metadata__")
        slices = json.loads(metadata["slices"])
        tensors = {}
        for key, entry in header.items():
            raw = bytearray(body[slice(*entry["data_offsets"])])
            values = torch.frombuffer(raw, dtype=DTYPES[entry["dtype"]]) if raw else torch.empty(0)
            tensors[key] = values.view(entry["shape"])
            kind, _, name = key.partition("/")
            if kind == "buffer" and file == FILES[0]:
                found[key] = tensors[key].double()
            elif kind not in ("buffer", "extra"):
                numel = math.prod(manifest["parameters"][name])
                whole = found.setdefault(key, torch.full((numel,), math.nan, dtype=torch.float64))
                whole[slice(*slices[key])] = tensors[key].double()
        if file == FILES[0]:
            found["extra"] = unpacked(json.loads(metadata["extra"]), tensors)
    for index, group in enumerate(manifest["optimizer"]["groups"]):
        for name in ("lr", "betas", "eps", "weight_decay"):
            found[f"{name} of {index}"] = group[name]
    return {**found, "steps": manifest["optimizer"]["steps"]}


def unpacked(value, tensors: dict[str, Tensor]):
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    if tag == "tensor":
        return tensors[content].tolist()
    if tag == "dict":
        return {name: unpacked(item, tensors) for name, item in content.items()}
    items = [unpacked(item, tensors) for item in content]
    return tuple(items) if tag == "tuple" else items


def plain(extra):
    """Tensors as lists, however deep they lie."""
    if isinstance(extra, dict):
        return {name: plain(value) for name, value in extra.items()}
    if isinstance(extra, list | tuple):
        return type(extra)(map(plain, extra))
    return extra.tolist() if isinstance(extra, Tensor) else extra


def had(model, optimizer, extra) -> dict[str, object]:
    """The same of a model on one process."""
    found: dict[str, object] = {"extra": plain(extra)}
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    for name, values in full(model).items():
        kind = "parameter" if name in parameters else "buffer"
        if name in parameters or name in buffers:
            found[f"{kind}/{name}"] = values.double().flatten() if kind == "parameter" else values.double()
    for unit in model._zerolite.units:
        for bucket in unit.buckets:
            for kind in optimizer.rule.state_names if bucket.gradients is not None else ():
                values = optimizer.read_state(bucket, kind)
                for slot in bucket.layout.slots:
                    found[f"{kind}/{slot.name}"] = slot.range.of(values).double()
    description = optimizer.describe()
    for index, group in enumerate(description["groups"]):
        for name in ("lr", "betas", "eps", "weight_decay"):
            found[f"{name} of {index}"] = list(group[name]) if name == "betas" else group[name]
    return {**found, "steps": description["steps"]}


def differing(expected: dict, found: dict) -> list[str]:
    """Names of what is not the same, of what either has; empty tensors are not saved."""

    def same(one, other) -> bool:
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            return one.shape == other.shape and torch.equal(one.nan_to_num(7.7e77), other.nan_to_num(7.7e77))
        if one is ABSENT or other is ABSENT:
            return all(value is ABSENT or isinstance(value, Tensor) and value.numel() == 0 for value in (one, other))
        return repr(one) == repr(other) or one == other

    names = sorted(expected.keys() | found.keys())
    return [name for name in names if not same(expected.get(name, ABSENT), found.get(name, ABSENT))]


# the campaign


def save_one_step(folder: Path) -> None:
    model, optimizer = make(3)
    train(model, optimizer, range(1))
    extra = {"step": 1, "random": torch.arange(9, dtype=torch.int64), "pair": (None, [0.5, {"name": "x"}])}
    zerolite.save(model, folder, optimizer, extra)


def load_mutations(folder: Path, trials: int, seed: int) -> tuple[int, list[str]]:
    """How many of the trials loaded, and what was wrong."""
    draw = random.Random(seed)
    originals = {path.name: path.read_bytes() for path in folder.iterdir()}
    model, optimizer = make(3, seed=1)
    original = had(model, optimizer, zerolite.load(model, folder, optimizer))
    train(model, optimizer, range(1))  # else a load that stops half-way would change nothing
    other = folder.with_name("other")
    zerolite.save(model, other, optimizer)
    before = state(model, optimizer)
    loaded, failures = 0, []
    for trial in range(trials):
        for name, data in originals.items():
            (folder / name).write_bytes(data)
        mutation = draw.choice([resigned, unsigned])
        mutation(folder, draw)
        extras: list = []
        kind, text = attempt(lambda extras=extras: extras.append(zerolite.load(model, folder, optimizer)))
        if kind:
            if kind != "CheckpointError" or not unchanged(before, state(model, optimizer)):
                failures.append(f"{mutation.__name__} {trial}: {kind} {text[:300]}")
            continue
        loaded += 1
        found = had(model, optimizer, *extras)
        wrong = differing(said(folder), found) or (differing(original, found) if mutation is unsigned else [])
        if wrong:
            failures.append(f"{mutation.__name__} {trial}: other values of {', '.join(wrong[:5])}")
        if loaded % DONE_AGAIN == 0:
            error = attempt(partial(train, model, optimizer, range(1)))
            if error[0]:
                failures.append(f"{mutation.__name__} {trial}: it loaded, and a step then said {error}")
        zerolite.load(model, other, optimizer)
        if not unchanged(before, state(model, optimizer)):
            failures.append(f"{mutation.__name__} {trial}: the next load left something of this one")
            before = state(model, optimizer)
    return loaded, failures


@pytest.mark.parametrize("trials", [1000, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_any_mutation_is_refused_whole_or_loads_what_the_files_say(ranks, tmp_path, trials):
    """A CheckpointError that changed nothing, or every value as it stands in the files, and a step is possible."""
    ranks(2).run(save_one_step, tmp_path / "step")
    team = ranks(1, timeout=60 + 0.5 * trials)
    ((loaded, failures),) = team.run(load_mutations, tmp_path / "step", trials, 5)
    print(f"{trials} mutations, {loaded} loaded, {len(failures)} failures")
    assert not failures, "\n".join(failures[:20])
    assert 0 < loaded < trials
