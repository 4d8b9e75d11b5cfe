"""Checkpoints hold all of the state, and load at any layout."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models import Stack, assert_close, assert_same_bits, drawn
from saved import attempt, full, load_extra, make, rank, save_steps, state, train, tree
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
    zerolite.save(model, folder, optimizer, extra=scheduler.state_dict())
    saved = state(model, optimizer)
    again, other = make(stage, dtype, rule, seed=1)
    scheduler_again = schedule(other)
    fresh = state(again, other)
    scheduler_again.load_state_dict(zerolite.load(again, folder, other))
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
    zerolite.save(model, folder, optimizer, extra={**EXTRA, "rank": rank()})


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
    return attempt(lambda: zerolite.save(model, folder, optimizer, extra=bad if rank() == 1 else None))


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
        zerolite.save(model, folder / f"{dist.get_world_size()}-{stage}", optimizer)
        saved = full(model)
        train(model, optimizer, range(3, 4))
        trained.append((saved, full(model)))
    return trained


def load_every_stage(folder: Path, stage: int):
    import zerolite

    results = {}
    for path in sorted(folder.iterdir()):
        model, optimizer = make(stage, seed=1)
        zerolite.load(model, path, optimizer)
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
    zerolite.save(model, folder, optimizer, extra=rank())
    return full(model)


def load_on_mesh(folder: Path, shape: tuple[int, ...], stage: int):
    import zerolite

    mesh = dist.device_mesh.init_device_mesh("cpu", shape)
    model, optimizer = make(stage, seed=1, mesh=mesh)
    extra = zerolite.load(model, folder, optimizer)
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
    zerolite.save(model, folder, optimizer)
    again, other = start(None)
    zerolite.load(again, folder, other)
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
    zerolite.save(model, folder / "bare")
    zerolite.save(model, folder / "whole", optimizer)
    expected = full(model)
    results = []
    for name in ("bare", "whole"):
        again, other = make(3, seed=1)
        assert zerolite.load(again, folder / name) is None
        results.append((full(again), other.describe()["steps"]))
    again, other = make(3, seed=1)
    before = state(again, other)
    refused = attempt(lambda: zerolite.load(again, folder / "bare", other))
    assert_same_bits(state(again, other), before)
    return expected, results, refused


def test_without_an_optimizer(ranks, tmp_path):
    """Parameters save and load alone; an optimizer that the checkpoint does not hold is refused."""
    for expected, results, (kind, text) in ranks(2).run(save_and_load_without, tmp_path):
        for loaded, steps in results:
            assert_same_bits(loaded, expected)
            assert set(steps.values()) == {0}
        assert kind == "CheckpointError" and "holds no optimizer" in text


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
    return attempt(lambda: zerolite.save(model, folder, optimizer))


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
