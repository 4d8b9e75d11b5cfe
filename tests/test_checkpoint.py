"""Checkpoints hold all of the state, load at any layout, and refuse what is not whole, not theirs, or not writable."""

from __future__ import annotations

import errno
import json
import math
import random
import resource
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models import Stack, assert_close, assert_same_bits, drawn
from saved import Odd, attempt, full, make, rank, state, train, tree
from torch import nn

STAGES = (0, 1, 2, 3)
WORLDS = (1, 2, 3)


# the same layout


def resume(folder: Path, stage: int, dtype: torch.dtype, rule: str):
    import zerolite

    def schedule(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    model, optimizer = make(stage, dtype, rule)
    scheduler = schedule(optimizer)
    for step in range(2):
        train(model, optimizer, range(step, step + 1))
        scheduler.step()
    zerolite.save(folder, model, optimizer, extra=scheduler.state_dict())
    saved = state(model, optimizer)
    again, other = make(stage, dtype, rule, seed=1)
    scheduler_again = schedule(other)
    fresh = state(again, other)
    scheduler_again.load_state_dict(zerolite.load(folder, again, other))
    loaded = state(again, other)
    for step in range(2, 5):
        for pair in ((model, optimizer, scheduler), (again, other, scheduler_again)):
            train(*pair[:2], range(step, step + 1))
            pair[2].step()
    return saved, fresh, loaded, state(model, optimizer), state(again, other)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "rule, dtype",
    [("AdamW", torch.float32), ("Adam", torch.float64), ("Lamb", torch.bfloat16), ("Lion", torch.float16)],
    ids=["AdamW-fp32", "Adam-fp64", "Lamb-bf16", "Lion-fp16"],
)
def test_a_run_goes_on_bit_for_bit(ranks, tmp_path, rule, dtype, stage):
    """Masters, states, steps, groups, schedule, loss scale and buffers come back, and the rest of the run with them."""
    for saved, fresh, loaded, straight, resumed in ranks(2).run(resume, tmp_path / "step-2", stage, dtype, rule):
        assert_same_bits(loaded, saved)
        assert_same_bits(resumed, straight)
        for mine, other in ((fresh, saved), (saved, straight)):
            stale = {key for key in mine if torch.equal(mine[key], other[key]) and mine[key].any()}
            assert all("0 " in key or "table" in key or "group" in key for key in stale), stale  # frozen, or a constant


EXTRA = {
    "nothing": None,
    "numbers": [1, -(2**200), 0.1, 1e-320, math.inf, True, ""],
    "tuple": (1, [2, (3, {"text": "äöü 医学 \ud800\x00"})], ()),
    "empty": {"dict": {}, "list": [], "tensor": torch.empty(2, 0)},
    "tensor": {"tensor": {"dict": torch.arange(6).view(2, 3).T}},  # names that the format uses; not contiguous
    "a/b": torch.tensor(1.5),
    "a": {"b": torch.tensor([True, False]), "": torch.tensor(7, dtype=torch.uint8)},
    "types": [torch.ones(2, dtype=dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.int64)],
}


def same(here, there) -> bool:
    if isinstance(here, torch.Tensor):
        return isinstance(there, torch.Tensor) and here.dtype == there.dtype and torch.equal(here, there)
    if isinstance(here, dict):
        return isinstance(there, dict) and list(here) == list(there) and all(same(here[k], there[k]) for k in here)
    if isinstance(here, list | tuple):
        return (
            type(here) is type(there) and len(here) == len(there) and all(map(same, here, there))  # noqa: B905
        )
    return type(here) is type(there) and here == there


def save_extra(folder: Path):
    import zerolite

    model, optimizer = make(2)
    zerolite.save(folder, model, optimizer, extra={**EXTRA, "rank": rank()})


def load_extra(folder: Path):
    import zerolite

    return zerolite.load(folder, *make(3))


def test_extra_values_come_back_to_their_rank_with_their_types(ranks, tmp_path):
    """Nested values and tensors return exactly; a rank beyond the saved world gets rank 0's."""
    ranks(2).run(save_extra, tmp_path / "step")
    for world in WORLDS:
        for number, extra in enumerate(ranks(world).run(load_extra, tmp_path / "step")):
            assert same(extra, {**EXTRA, "rank": number if number < 2 else 0})


def save_bad_extra(folder: Path, number: int):
    import zerolite

    bad = [{"a": [1, {2, 3}]}, {"a": {1: 2}}, {"a": object()}, {"a": torch.nn}][number]
    model, optimizer = make(1)
    return attempt(lambda: zerolite.save(folder, model, optimizer, extra=bad if rank() == 1 else None))


@pytest.mark.parametrize(
    "number, place", [(0, "extra['a'][1]"), (1, "extra['a']"), (2, "extra['a']"), (3, "extra['a']")]
)
def test_extra_that_no_json_holds_is_refused_by_its_place(ranks, tmp_path, number, place):
    """One rank's bad value fails the save on all ranks, with the value's path, and leaves nothing."""
    for kind, text in ranks(2).run(save_bad_extra, tmp_path / "step", number):
        assert kind == "CheckpointError" and "rank 1: TypeError" in text and place in text
    assert not list(tmp_path.iterdir())


# other layouts


def save_every_stage(folder: Path):
    import zerolite

    trained = []
    for stage in STAGES:
        model, optimizer = make(stage)
        train(model, optimizer, range(3))
        zerolite.save(folder / f"{dist.get_world_size()}-{stage}", model, optimizer)
        saved = full(model)
        train(model, optimizer, range(3, 4))
        trained.append((saved, full(model)))
    return trained


def load_every_stage(folder: Path, stage: int):
    import zerolite

    results = {}
    for path in sorted(folder.iterdir()):
        model, optimizer = make(stage, seed=1)
        zerolite.load(path, model, optimizer)
        loaded = full(model)
        train(model, optimizer, range(3, 4))
        results[path.name] = loaded, full(model)
    return results


def parameters(tensors: dict) -> dict:
    return {name: tensor for name, tensor in tensors.items() if name not in ("count", "sum")}


def test_every_stage_and_world_size_loads_every_other(ranks, tmp_path):
    """All 144 pairs give equal bits; training goes on with equal bits at the world that saved, to 1e-9 at others."""
    saved = {world: ranks(world).run(save_every_stage, tmp_path)[0] for world in WORLDS}
    assert len(list(tmp_path.iterdir())) == 12
    for world in WORLDS:
        for stage in STAGES:
            for results in ranks(world).run(load_every_stage, tmp_path, stage):
                for name, (loaded, continued) in results.items():
                    origin, origin_stage = map(int, name.split("-"))
                    expected, straight = saved[origin][origin_stage]
                    assert_same_bits(parameters(loaded), parameters(expected))
                    if origin == world:
                        assert_same_bits(parameters(continued), parameters(straight))
                    else:
                        assert_close(parameters(continued), parameters(straight))


def save_on_mesh(folder: Path, shape: tuple[int, ...], stage: int):
    import zerolite

    mesh = dist.device_mesh.init_device_mesh("cpu", shape)
    model, optimizer = make(stage, mesh=mesh)
    train(model, optimizer, range(2))
    zerolite.save(folder, model, optimizer, extra=rank())
    return full(model)


def load_on_mesh(folder: Path, shape: tuple[int, ...], stage: int):
    import zerolite

    mesh = dist.device_mesh.init_device_mesh("cpu", shape)
    model, optimizer = make(stage, seed=1, mesh=mesh)
    extra = zerolite.load(folder, model, optimizer)
    return full(model), state(model, optimizer), extra


@pytest.mark.parametrize("stage", [1, 3])
def test_replicas_of_shards_load_as_shards_and_back(ranks, tmp_path, stage):
    """A 2 x 2 mesh's checkpoint holds each element once and loads on 1-D meshes; a 1-D one loads on 2 x 2."""
    saved = ranks(4).run(save_on_mesh, tmp_path / "replicated", (2, 2), stage)
    sizes = [path.stat().st_size for path in sorted((tmp_path / "replicated").glob("rank-*"))]
    assert sizes[2] < sizes[0] / 2 and sizes[3] < sizes[1] / 2  # the second replica writes no parameters
    for shape in ((2,), (3,)):
        for loaded, _, _ in ranks(shape[0]).run(load_on_mesh, tmp_path / "replicated", shape, stage):
            assert_same_bits(parameters(loaded), parameters(saved[0]))
    ranks(2).run(save_on_mesh, tmp_path / "flat", (2,), stage)
    flat = ranks(2).run(load_on_mesh, tmp_path / "flat", (2,), stage)
    square = ranks(4).run(load_on_mesh, tmp_path / "flat", (2, 2), stage)
    for number, (_, states, extra) in enumerate(square):
        if number < 2:
            assert_same_bits(states, flat[number][1])
        assert extra == (number if number < 2 else 0)


def other_units(folder: Path):
    import zerolite

    def start(units):
        model = zerolite.shard(drawn(Stack).double(), stage=3, units=units)
        return model, zerolite.AdamW(model.blocks[0].up.parameters(), lr=1e-2)

    model, optimizer = start(lambda module: isinstance(module, nn.Linear | nn.LayerNorm))
    train(model, optimizer, range(2))
    zerolite.save(folder, model, optimizer)
    again, other = start(None)
    zerolite.load(folder, again, other)
    train(model, optimizer, range(2, 4))
    train(again, other, range(2, 4))
    return full(model), full(again)


def test_units_may_be_cut_in_another_way(ranks, tmp_path):
    """A checkpoint of one choice of units, with an optimizer of a few parameters, goes on under another choice."""
    for straight, resumed in ranks(2).run(other_units, tmp_path / "step"):
        assert_same_bits(resumed, straight)


# without an optimizer; what stands there


def save_and_load_without(folder: Path):
    import zerolite

    model, optimizer = make(2)
    train(model, optimizer, range(1))
    zerolite.save(folder / "bare", model)
    zerolite.save(folder / "whole", model, optimizer)
    expected = full(model)
    results = []
    for name in ("bare", "whole"):
        again, other = make(3, seed=1)
        assert zerolite.load(folder / name, again) is None
        results.append((full(again), other.describe()["steps"]))
    again, other = make(3, seed=1)
    before = state(again, other)
    refused = attempt(lambda: zerolite.load(folder / "bare", again, other))
    assert_same_bits(state(again, other), before)
    return expected, results, refused


def test_without_an_optimizer(ranks, tmp_path):
    """Parameters save and load alone; an optimizer that the checkpoint does not hold is refused."""
    for expected, results, (kind, text) in ranks(2).run(save_and_load_without, tmp_path):
        for loaded, steps in results:
            assert_same_bits(loaded, expected)
            assert set(steps.values()) == {0}
        assert kind == "CheckpointError" and "holds no optimizer" in text


def save_steps(folder: Path, steps: int):
    import zerolite

    model, optimizer = make(3)
    train(model, optimizer, range(steps))
    zerolite.save(folder, model, optimizer, extra=steps)


@pytest.mark.parametrize("name", ["step", "st[e]p *"])
def test_a_checkpoint_is_replaced_whole(ranks, tmp_path, name):
    """A new checkpoint takes an old one's or an empty folder's place, with no old file in it and nothing beside it."""
    folder = tmp_path / name
    folder.mkdir()
    ranks(3).run(save_steps, folder, 1)
    leftover = tmp_path / f".{name}.tmp-0123"
    leftover.mkdir()
    (leftover / "rank-00000.safetensors").write_text("half")
    ranks(2).run(save_steps, folder, 2)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json",
        *(f"rank-0000{n}.safetensors" for n in "01"),
    ]
    assert ranks(1).run(load_extra, folder) == [2]


def test_a_link_to_a_folder_stays_a_link(ranks, tmp_path):
    """Saving through a symbolic link replaces what it points at."""
    ranks(1).run(save_steps, tmp_path / "real", 1)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    ranks(1).run(save_steps, tmp_path / "link", 2)
    assert (tmp_path / "link").is_symlink() and sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]
    assert ranks(1).run(load_extra, tmp_path / "real") == [2]


def save_at(folder: Path):
    import zerolite

    model, optimizer = make(2)
    return attempt(lambda: zerolite.save(folder, model, optimizer))


@pytest.mark.parametrize("kind", ["folder", "file", "below a file"])
def test_what_is_no_checkpoint_is_not_overwritten(ranks, tmp_path, kind):
    """A folder with other files, a file, and a path below a file are refused on every rank and stay as they are."""
    folder = tmp_path / "thesis"
    if kind == "folder":
        folder.mkdir()
        (folder / "chapter-1.tex").write_text("years")
    else:
        folder.write_text("years")
    before = tree(tmp_path)
    for name, text in ranks(2).run(save_at, folder / "step" if kind == "below a file" else folder):
        assert name == "CheckpointError" and "rank 0: " in text and str(folder) in text
    assert tree(tmp_path) == before


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
    error = attempt(lambda: zerolite.load(folder, model, optimizer))
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
        attempt(lambda: zerolite.save(folder, plain)),
        attempt(lambda: zerolite.load(folder, plain)),
        attempt(lambda: zerolite.save(folder, model, torch.optim.AdamW(plain.parameters()))),
        attempt(lambda: zerolite.save(folder, model, stranger)),
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
        error = attempt(lambda: zerolite.load(copy, model, optimizer))
        after = state(model, optimizer)
        results.append((*error, all(torch.equal(after[key], before[key]) for key in before)))
        dist.barrier()
        if rank() == 0:
            shutil.rmtree(copy, ignore_errors=True)
    zerolite.load(folder, model, optimizer)  # the whole one still loads
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
    from zerolite import checkpoint

    model, optimizer = make(1)
    checkpoint.VERSION = 2
    try:
        zerolite.save(folder, model, optimizer)
    finally:
        checkpoint.VERSION = 1
    return attempt(lambda: zerolite.load(folder, model, optimizer))


def test_a_newer_format_is_refused_by_its_number(ranks, tmp_path):
    """A checkpoint of a later version says which version it has and which can be read."""
    ((kind, text),) = ranks(1).run(load_from_the_future, tmp_path / "step")
    assert kind == "CheckpointError" and "zerolite-checkpoint 2" in text and "reads zerolite-checkpoint 1" in text


# not writable


def save_while_failing(folder: Path, failure: str, who: list[int]):
    """Save where the ranks `who` cannot, over an older checkpoint."""
    import zerolite
    from zerolite import checkpoint, files

    model, optimizer = make(2)
    train(model, optimizer, range(2))
    originals = (checkpoint.save_file, files.sync_file, files._exchange)
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
                checkpoint.save_file = no_space
            elif failure == "strange":
                checkpoint.save_file = strange
            elif failure == "sync":
                files.sync_file = no_space
            elif failure == "rename":
                files._exchange = no_space
        return attempt(lambda: zerolite.save(folder, model, optimizer, extra=2))
    finally:
        checkpoint.save_file, files.sync_file, files._exchange = originals
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
    from zerolite import files

    model, optimizer = make(3, seed=1)
    before = state(model, optimizer)
    original = files.sha256_of

    def unreadable(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    if rank() == who:
        files.sha256_of = unreadable
    try:
        error = attempt(lambda: zerolite.load(folder, model, optimizer))
    finally:
        files.sha256_of = original
    assert_same_bits(state(model, optimizer), before)
    return error


def test_a_rank_that_cannot_read_fails_the_load_everywhere(ranks, tmp_path):
    """An input error on one rank is a CheckpointError on all, naming it, and nothing changes."""
    ranks(3).run(save_steps, tmp_path / "step", 1)
    for kind, text in ranks(3).run(load_while_failing, tmp_path / "step", 2):
        assert kind == "CheckpointError" and "rank 2: OSError" in text and "Input/output" in text
