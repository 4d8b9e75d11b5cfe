"""Checkpoints see what lies on the host, whole and stepped, and move between layouts with offload and without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from delays import slow_workers
from models import assert_close, assert_same_bits
from saved import full, make, state, train, tree
from zerolite_kernels import cpu

from zerolite import Offload

pytestmark = pytest.mark.skipif(cpu.path() is None, reason="the host kernels were not built")

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
SLOW_S = 0.005
STREAMED = Offload(parameters=True)


def resume(folder: Path, stage: int, dtype: torch.dtype, rule: str, offload: Offload):
    """Saved right after a step, while the workers are at it."""
    import zerolite

    with slow_workers(SLOW_S):
        model, optimizer = make(stage, dtype, rule, offload=offload)
        again, other = make(stage, dtype, rule, seed=1, offload=offload)
    on_host = [bucket.shard.steps_in_background for bucket in model._zerolite.reducer.order]
    assert any(on_host) and all(on_host) == (offload.budget is None)
    train(model, optimizer, range(2))
    zerolite.save(model, folder / "at once", optimizer)
    saved = state(model, optimizer)
    zerolite.save(model, folder / "later", optimizer)
    train(again, other, range(5, 8))  # and loaded while they are at something else
    fresh = state(again, other)
    train(again, other, range(8, 9))
    zerolite.load(again, folder / "at once", other)
    loaded = state(again, other)
    for pair in ((model, optimizer), (again, other)):
        train(*pair, range(2, 4))
    return saved, fresh, loaded, state(model, optimizer), state(again, other)


@pytest.mark.parametrize(
    "stage, dtype, rule, offload, is_on_drive",
    [
        (0, FP32, "AdamW", Offload(), False),
        (1, FP64, "Adam", Offload(workers=2, threads=1), False),
        (2, BF16, "Lamb", Offload(states="int8"), False),
        (3, FP16, "Lion", Offload(), False),
        (3, BF16, "AdamW", Offload(states="bf16", parameters=True), False),
        (1, BF16, "AdamW", Offload(states="int8"), True),
        (3, FP32, "AdamW", Offload(parameters=True), True),
        (2, BF16, "AdamW", Offload(budget="17KB"), False),
    ],
)
def test_a_run_goes_on_bit_for_bit(ranks, tmp_path, stage, dtype, rule, offload, is_on_drive):
    """Masters, states of every format, steps and loss scale; a save at once waits for the step that is under way."""
    if is_on_drive:
        offload = Offload(**{**vars(offload), "path": str(tmp_path)})
    results = ranks(2).run(resume, tmp_path / "steps", stage, dtype, rule, offload)
    assert tree(tmp_path / "steps" / "at once") == tree(tmp_path / "steps" / "later")
    for saved, fresh, loaded, straight, resumed in results:
        assert_same_bits(loaded, saved)
        assert_same_bits(resumed, straight)
        for mine, other in ((fresh, saved), (saved, straight)):
            stale = {key for key in mine if torch.equal(mine[key], other[key]) and mine[key].any()}
            assert all("0 " in key or "table" in key or "group" in key for key in stale), stale  # frozen, or a constant


def return_from_a_spike(folder: Path, stage: int, offload: Offload):
    import zerolite

    model, optimizer = make(stage, BF16, offload=offload)
    train(model, optimizer, range(2))
    zerolite.save(model, folder, optimizer)
    saved = state(model, optimizer)
    optimizer.max_grad_norm = None
    for _ in range(2):
        (model(torch.ones(4, 5)).float().square().sum() * 1e4).backward()
        optimizer.step()
        optimizer.zero_grad()
    spiked = state(model, optimizer)
    zerolite.load(model, folder, optimizer)
    return saved, spiked, state(model, optimizer)


@pytest.mark.parametrize("states", ["fp32", "bf16", "int8"])
def test_nothing_of_what_was_there_is_left(ranks, tmp_path, states):
    """After a loss spike a run goes back to its last checkpoint: int8 blocks are scaled by what was loaded alone."""
    for stage, parameters in ((2, False), (3, True)):
        offload = Offload(states=states, parameters=parameters)
        for saved, spiked, loaded in ranks(2).run(return_from_a_spike, tmp_path / "step", stage, offload):
            assert any(spiked[key].max() > 1e3 * saved[key].max() > 0 for key in saved if "exp_avg_sq" in key)
            assert_same_bits(
                {key: value for key, value in loaded.items() if "buffer" not in key},
                {key: value for key, value in saved.items() if "buffer" not in key},
            )


def chain(folder: Path, stage: int, dtype: torch.dtype, offload: Offload):
    import zerolite

    model, optimizer = make(stage, dtype, offload=offload)
    train(model, optimizer, range(2))
    zerolite.save(model, folder / "0", optimizer)
    for number, there in enumerate((None, offload, Offload(workers=2, threads=1), offload), start=1):
        model, optimizer = make(stage, dtype, seed=number, offload=there)
        zerolite.load(model, folder / str(number - 1), optimizer)
        zerolite.save(model, folder / str(number), optimizer)


@pytest.mark.parametrize(
    "stage, dtype, offload",
    [
        (1, BF16, Offload(states="int8")),
        (3, BF16, Offload(states="bf16", parameters=True)),
        (2, BF16, Offload()),
        (1, FP16, Offload()),
        (0, FP32, Offload()),
    ],
)
def test_to_the_device_and_back_loses_no_bit(ranks, tmp_path, stage, dtype, offload):
    """Offloaded, on the device, offloaded in other ways: the same files each time; narrow states are exact in fp32."""
    ranks(2).run(chain, tmp_path, stage, dtype, offload)
    first, *others = [files_of(tmp_path / str(number)) for number in range(5)]
    for other in others:
        assert other == first


def files_of(folder: Path) -> tuple[dict[str, bytes], dict]:
    """The ranks' files, and the manifest but for its hash and how ties were rounded, which is another on the device."""
    files = tree(folder)
    manifest = json.loads(files.pop("manifest.json"))
    manifest["model"].pop("ties_away", None)
    return files, {name: value for name, value in manifest.items() if name != "sha256"}


def parameters(tensors: dict) -> dict:
    return {name: tensor for name, tensor in tensors.items() if name not in ("count", "sum")}


LAYOUTS = {
    "device 1": (1, None),
    "host 0": (0, Offload()),
    "host 2": (2, Offload(workers=2, threads=1)),
    "host 3": (3, Offload()),
    "streamed": (3, STREAMED),
    "budget": (2, Offload(budget="23KB")),
}


def save_all(folder: Path):
    import zerolite

    results = {}
    for name, (stage, offload) in LAYOUTS.items():
        model, optimizer = make(stage, FP32, offload=offload)
        train(model, optimizer, range(2))
        zerolite.save(model, folder / name, optimizer)
        train(model, optimizer, range(2, 3))
        results[name] = full(model)
    return results


def load_all(folder: Path, names: list[str]):
    import zerolite

    results = {}
    for here in names:
        stage, offload = LAYOUTS[here]
        model, optimizer = make(stage, FP32, seed=1, offload=offload)
        for there in LAYOUTS:
            zerolite.load(model, folder / there, optimizer)
            train(model, optimizer, range(2, 3))
            results[f"{there} to {here}"] = full(model)
    return results


def test_every_layout_loads_every_other(ranks, tmp_path):
    """The next step has the same bits at this world size; at others it is close."""
    expected = ranks(2).run(save_all, tmp_path)[0]
    for results in ranks(2).run(load_all, tmp_path, list(LAYOUTS)):
        assert len(results) == len(LAYOUTS) ** 2
        for name, result in results.items():
            assert_same_bits(parameters(result), parameters(expected[name.split(" to ")[0]]))
    for world, here in ((1, "streamed"), (3, "host 2")):
        for results in ranks(world).run(load_all, tmp_path, [here]):
            for result in results.values():
                assert_close(parameters(result), parameters(expected["device 1"]), rtol=1e-3, atol=1e-4)


def resume_elsewhere(folder: Path, states: str):
    import zerolite

    results = []
    for stage, offload in (
        (2, Offload(states=states)),
        (0, Offload(states=states, workers=2, threads=1)),
        (3, Offload(states=states, parameters=True)),
    ):
        model, optimizer = make(stage, BF16, seed=stage, offload=offload)
        if not results:
            train(model, optimizer, range(2))
            zerolite.save(model, folder / "step", optimizer)
        else:
            zerolite.load(model, folder / "step", optimizer)
        train(model, optimizer, range(2, 4))
        results.append(full(model))
    return results


@pytest.mark.parametrize("states", ["bf16", "int8"])
def test_narrow_states_go_on_alike_at_every_stage(ranks, tmp_path, states):
    """The draws of stochastic rounding go on with the step that was saved."""
    for first, *others in ranks(2).run(resume_elsewhere, tmp_path, states):
        for other in others:
            assert_same_bits(parameters(other), parameters(first))
