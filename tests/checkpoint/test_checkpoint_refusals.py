"""What is not whole, not of this model, or not readable and writable is refused on every rank, and changes nothing."""

from __future__ import annotations

import errno
import json
import random
import resource
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models import Stack, assert_same_bits
from saved import Odd, attempt, load_extra, make, rank, save_steps, state, train, tree
from torch import nn

# not of this model


class Wide(Odd):
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(7, 4)


class More(Odd):
    def __init__(self):
        super().__init__()
        self.blocks[1].spare = nn.Linear(2, 2)


class Thawed(Odd):
    def __init__(self):
        super().__init__()
        self.blocks[1].up.bias.requires_grad_(True)


class OtherBuffer(Odd):
    def __init__(self):
        super().__init__()
        self.register_buffer("sum", torch.zeros(6))


class Renamed(Odd):
    def __init__(self):
        super().__init__()
        self.scale, self.scalar = self.scalar, None


def load_into(folder: Path, what: str):
    import zerolite

    if what in ("Lion", "Adam"):
        model, optimizer = make(3, rule=what, seed=1)
    elif what == "groups":
        model, optimizer = make(3, seed=1)
        optimizer = zerolite.AdamW(model.parameters(), lr=1e-2)
    elif what == "Stack":
        model = zerolite.shard(Stack().double(), stage=3)
        optimizer = zerolite.AdamW(model.parameters())
    else:
        model, optimizer = make(3, cls=globals()[what], seed=1)
    before = state(model, optimizer)
    error = attempt(lambda: zerolite.load(model, folder, optimizer))
    assert_same_bits(state(model, optimizer), before)
    return error


@pytest.mark.parametrize(
    "what, parts",
    [
        ("Wide", ["another model", "last.weight", "[3, 7]", "[4, 7]"]),
        ("More", ["another model", "blocks.1.spare.weight", "absent there", "[2, 2] here"]),
        ("Renamed", ["another model", "scalar", "[] there", "absent here"]),
        ("Stack", ["another model", "parameter nothing is [3, 0] there and absent here"]),
        ("OtherBuffer", ["another model", "buffer sum", "[5] there", "[6] here"]),
        ("Thawed", ["frozen", "blocks.1.up.bias", "only here"]),
        ("Lion", ["AdamW", "Lion"]),
        ("Adam", ["AdamW", "Adam"]),
        ("groups", ["param groups of [1, "]),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(ranks, tmp_path, what, parts):
    """Another model, optimizer or grouping is named in a CheckpointError on every rank, and nothing changes."""
    ranks(2).run(save_steps, tmp_path / "step", 1)
    for kind, text in ranks(2).run(load_into, tmp_path / "step", what):
        assert kind == "CheckpointError" and all(piece in text for piece in parts), text


def wrong_arguments(folder: Path):
    import zerolite

    model, optimizer = make(1)
    _, stranger = make(1)
    plain = Stack()
    return [
        attempt(lambda: zerolite.save(plain, folder)),
        attempt(lambda: zerolite.load(plain, folder)),
        attempt(lambda: zerolite.save(model, folder, torch.optim.AdamW(plain.parameters()))),
        attempt(lambda: zerolite.save(model, folder, stranger)),
    ]


def test_wrong_arguments(ranks, tmp_path):
    """A model that is not sharded, and an optimizer that is not its own, are a user's mistakes."""
    for results in ranks(2).run(wrong_arguments, tmp_path / "step"):
        assert [kind for kind, _ in results] == ["ValueError", "ValueError", "TypeError", "ValueError"]
        assert "zerolite.shard" in results[0][1] and "another model" in results[3][1]
    assert not list(tmp_path.iterdir())


# damaged


def load_damaged(folder: Path, damages: list):
    """Apply each damage to a copy, try to load it, and report what came and whether anything changed."""
    import zerolite

    model, optimizer = make(3, seed=1)
    before = state(model, optimizer)
    copy = folder.with_name("copy")
    results = []
    for damage in damages:
        if rank() == 0:
            shutil.copytree(folder, copy)
            apply(copy, *damage)
        dist.barrier()
        error = attempt(lambda: zerolite.load(model, copy, optimizer))
        after = state(model, optimizer)
        results.append((*error, all(torch.equal(after[key], before[key]) for key in before)))
        dist.barrier()
        if rank() == 0:
            shutil.rmtree(copy, ignore_errors=True)
    zerolite.load(model, folder, optimizer)  # the whole one still loads
    return results


def apply(folder: Path, kind: str, name: str, value) -> None:
    path = folder / name
    if kind == "remove":
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif kind == "write":
        path.write_bytes(value)
    elif kind == "truncate":
        path.write_bytes(path.read_bytes()[:value])
    elif kind == "swap":
        other = folder / value
        mine, theirs = path.read_bytes(), other.read_bytes()
        path.write_bytes(theirs), other.write_bytes(mine)
    else:
        data = bytearray(path.read_bytes())
        data[value[0]] ^= value[1]
        path.write_bytes(data)


def check_damages(ranks, tmp_path, damages: list, part: str = "") -> None:
    ranks(2).run(save_steps, tmp_path / "step", 1)
    for results in ranks(2).run(load_damaged, tmp_path / "step", damages):
        for damage, (kind, text, unchanged) in zip(damages, results, strict=True):
            assert kind == "CheckpointError" and unchanged, f"{damage}: {kind or 'it loaded'} {text}, {unchanged=}"
            assert part in text, text


FILES = ["manifest.json", "rank-00000.safetensors", "rank-00001.safetensors"]


@pytest.mark.parametrize("name", FILES)
def test_one_changed_bit_anywhere_is_seen(ranks, tmp_path, name):
    """A bit flipped at any of 25 places of a file is a CheckpointError on every rank, and nothing changes."""
    ranks(2).run(save_steps, tmp_path / "step", 1)
    size = (tmp_path / "step" / name).stat().st_size
    draw = random.Random(name)
    places = [0, 1, size - 1, *(draw.randrange(size) for _ in range(22))]
    check_damages(ranks, tmp_path, [("flip", name, (place, 1 << draw.randrange(8))) for place in places], "")


def test_a_file_that_was_cut_or_removed_or_swapped_is_seen(ranks, tmp_path):
    """Truncated, missing, grown and exchanged files are CheckpointErrors on every rank, and nothing changes."""
    damages = [("truncate", name, size) for name in FILES for size in (0, 1, 100, -1)]
    damages += [("remove", name, None) for name in FILES]
    damages += [("swap", FILES[1], FILES[2]), ("swap", FILES[0], FILES[1]), ("remove", ".", None)]
    check_damages(ranks, tmp_path, damages)


def test_missing_files_are_named(ranks, tmp_path):
    """The message names the file that is missing, and says what a folder without a manifest is not."""
    check_damages(ranks, tmp_path, [("remove", FILES[2], None)], f"{FILES[2]} is missing")
    check_damages(ranks, tmp_path, [("remove", FILES[0], None)], "no complete checkpoint")
    check_damages(ranks, tmp_path, [("truncate", FILES[1], 100)], "has 100 bytes")


def test_malformed_manifests_are_refused(ranks, tmp_path):
    """No manifest that JSON can hold is anything but a CheckpointError."""
    ranks(2).run(save_steps, tmp_path / "step", 1)
    manifest = json.loads((tmp_path / "step" / FILES[0]).read_text())
    texts = [b"", b"{}", b"[]", b"null", b"7", b"\xff\xfe", b"[" * 100_000, b'{"format": "zerolite-checkpoint"}']
    for key in manifest:
        for value in (None, 7, "x", [], {}):
            texts.append(json.dumps({**manifest, key: value}).encode())
        texts.append(json.dumps({name: manifest[name] for name in manifest if name != key}).encode())
    check_damages(ranks, tmp_path, [("write", FILES[0], text) for text in texts])


def load_from_the_future(folder: Path):
    import zerolite
    from zerolite.checkpoint import manifest

    model, optimizer = make(1)
    before, manifest.PLAIN_VERSION = manifest.PLAIN_VERSION, 3
    try:
        zerolite.save(model, folder, optimizer)
    finally:
        manifest.PLAIN_VERSION = before
    return attempt(lambda: zerolite.load(model, folder, optimizer))


def test_a_newer_format_is_refused_by_its_number(ranks, tmp_path):
    """A checkpoint of a later version says which version it has and which can be read."""
    ((kind, text),) = ranks(1).run(load_from_the_future, tmp_path / "step")
    assert kind == "CheckpointError" and "zerolite-checkpoint 3" in text and "reads zerolite-checkpoint 2" in text


# not writable


def save_while_failing(folder: Path, failure: str, who: list[int]):
    """Save where the ranks `who` cannot, over an older checkpoint."""
    import zerolite
    from zerolite.runtime import atomic_dir as files
    from zerolite.runtime import safetensors_file

    model, optimizer = make(2)
    train(model, optimizer, range(2))
    originals = (safetensors_file.write_safetensors, files.sync_file, files._exchange)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def no_space(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    def strange(*args, **options):
        raise RuntimeError("a library's own error")

    try:
        if rank() in who:
            if failure == "quota":
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
            elif failure == "disk full":
                safetensors_file.write_safetensors = no_space
            elif failure == "strange":
                safetensors_file.write_safetensors = strange
            elif failure == "sync":
                files.sync_file = no_space
            elif failure == "rename":
                files._exchange = no_space
        return attempt(lambda: zerolite.save(model, folder, optimizer, extra=2))
    finally:
        safetensors_file.write_safetensors, files.sync_file, files._exchange = originals
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    "failure, who",
    [
        ("quota", [0]),
        ("quota", [1]),
        ("quota", [0, 1, 2]),
        ("disk full", [2]),
        ("strange", [1]),
        ("sync", [0]),
        ("rename", [0]),
    ],
)
def test_a_rank_that_cannot_write_fails_the_save_everywhere(ranks, tmp_path, failure, who):
    """All ranks raise CheckpointError naming those that failed; nothing is left, and the old one is untouched."""
    ranks(3).run(save_steps, tmp_path / "step", 1)
    before = tree(tmp_path)
    for kind, text in ranks(3).run(save_while_failing, tmp_path / "step", failure, who):
        assert kind == "CheckpointError" and f"on {len(who)} of 3 ranks" in text, text
        assert [number for number in range(3) if f"rank {number}: " in text] == who
    assert tree(tmp_path) == before
    ranks(3).run(save_steps, tmp_path / "step", 2)
    assert ranks(1).run(load_extra, tmp_path / "step") == [2]


def load_while_failing(folder: Path, who: int):
    import zerolite
    from zerolite.runtime import atomic_dir as files

    model, optimizer = make(3, seed=1)
    before = state(model, optimizer)
    original = files.sha256_of

    def unreadable(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    if rank() == who:
        files.sha256_of = unreadable
    try:
        error = attempt(lambda: zerolite.load(model, folder, optimizer))
    finally:
        files.sha256_of = original
    assert_same_bits(state(model, optimizer), before)
    return error


def test_a_rank_that_cannot_read_fails_the_load_everywhere(ranks, tmp_path):
    """An input error on one rank is a CheckpointError on all, naming it, and nothing changes."""
    ranks(3).run(save_steps, tmp_path / "step", 1)
    for kind, text in ranks(3).run(load_while_failing, tmp_path / "step", 2):
        assert kind == "CheckpointError" and "rank 2: OSError" in text and "Input/output" in text
