"""From `step` to the next one: nobody reads an old value, whoever asks waits, and what ends leaves nothing behind.

A run without offload is the truth, bit by bit; the workers are slow, so that a missing wait is seen.
"""

from __future__ import annotations

import copy
import gc
import math
import os
import warnings
from pathlib import Path

import psutil
import pytest
import torch
from cases import data, squared
from delays import slow_workers
from models import Stack, assert_same_bits, build, drawn, joint_batch, loss_of, part, whole
from saved import rank, state
from torch import nn
from zerolite_kernels import cpu

from zerolite import Offload

pytestmark = pytest.mark.skipif(cpu.path() is None, reason="the host kernels were not built")

FP32 = torch.float32
SLOW_S = 0.01
STREAMED = Offload(parameters=True)
LAYOUTS = [(0, Offload()), (1, Offload()), (2, Offload(workers=2)), (3, Offload()), (3, STREAMED)]
WHOLE = LAYOUTS[:3]  # parameters stay whole


def make(stage: int, offload=None, model: nn.Module | None = None, **options):
    import zerolite

    model = zerolite.shard(drawn(Stack).float() if model is None else model, stage=stage, offload=offload)
    return model, zerolite.AdamW(model.parameters(), **{"lr": 1e-2, **options})


def backward(model: nn.Module, step: int) -> None:
    x, y = (tensor.float() for tensor in data(rank(), step))
    squared(model(x), y).backward()


def learn(model: nn.Module, optimizer, step: int) -> None:
    backward(model, step)
    optimizer.step()
    optimizer.zero_grad()


def full(model: nn.Module) -> dict[str, torch.Tensor]:
    import zerolite

    with zerolite.full_params(model):
        return whole(model)


def with_and_without(ranks, function, layouts=LAYOUTS, world: int = 2, options: tuple = ()) -> None:
    """`function(stage, offload, *options)` returns tensors by name, the same with offload and without."""
    expected = ranks(world).run(function, 1, None, *options)
    for stage, offload in layouts:
        for actual, truth in zip(ranks(world).run(function, stage, offload, *options), expected, strict=True):
            try:
                assert_same_bits(actual, truth)
            except AssertionError as error:
                raise AssertionError(f"stage {stage}, {offload}: {error}") from error


# who asks, waits


def by_export(model: nn.Module, folder: Path):
    from safetensors.torch import load_file

    import zerolite

    zerolite.export(model, folder)
    return load_file(folder / "model.safetensors") if rank() == 0 else {}


def by_saving(model: nn.Module, folder: Path):
    from safetensors import safe_open

    import zerolite

    zerolite.save(model, folder)
    found = {}
    for path in sorted(folder.glob("rank-*")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 : no mapping
                found.setdefault(key, []).append(file.get_tensor(key))
    return {key: torch.cat(pieces).sort().values for key, pieces in found.items() if pieces[0].dim() == 1}


def by_forward(model: nn.Module, folder: Path):
    model.eval()
    with torch.no_grad():
        logits = model(**joint_batch("llama", 9, FP32), use_cache=False).logits
    model.train()
    return {"logits": logits}


def by_generating(model: nn.Module, folder: Path):
    ids = torch.arange(3, 11)[None]
    return {"ids": model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, pad_token_id=0)}


READERS = {
    "full_params": lambda model, folder: full(model),
    "export": by_export,
    "save": by_saving,
    "forward": by_forward,
    "generate": by_generating,
}
READERS_OF_WHOLE = {
    "parameters": lambda model, folder: {str(i): p.detach().clone() for i, p in enumerate(model.parameters())},
    "named_parameters": lambda model, folder: whole(model),
    "state_dict": lambda model, folder: {name: value.clone() for name, value in model.state_dict().items()},
    "of a block": lambda model, folder: {n: v.clone() for n, v in model.model.layers[1].state_dict().items()},
}


def read_after_step(stage: int, offload, folder: Path):
    """Each way to read, right after a step of its own."""
    import zerolite

    with slow_workers(SLOW_S, is_fixed=True):
        model = zerolite.shard(build("llama", FP32), stage=stage, offload=offload)
        optimizer = zerolite.AdamW(model.parameters(), lr=1e-2)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    results = {}
    for name, read in {**READERS, **(READERS_OF_WHOLE if stage < 3 else {})}.items():
        if name == "of a block":
            list(model.parameters())  # torch asks a block itself; only the model knows when it is back
        loss_of(model, part(joint_batch("llama", len(results), FP32), rank(), 2)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if offload is not None:
            assert all(parameter.isnan().all() for parameter in held), "old values can be read"
        if name == "of a block":
            list(model.parameters())
        results[name] = read(model, folder / f"{name}-{stage}-{offload is None}-{offload == STREAMED}")
        assert all(value.isfinite().all() for value in results[name].values() if value.is_floating_point()), name
    return results


def test_parameters_read_as_nan_until_somebody_asks_who_gets_the_stepped_ones(ranks, tmp_path):
    expected = ranks(2).run(read_after_step, 1, None, tmp_path)
    for stage, offload in LAYOUTS:
        for results, truth in zip(ranks(2).run(read_after_step, stage, offload, tmp_path), expected, strict=True):
            for name, result in results.items():
                assert_same_bits(result, truth[name])


def first_parameter(stage: int):
    with slow_workers(0.1, is_fixed=True):
        model, optimizer = make(stage, Offload())
    held = list(model.parameters())
    learn(model, optimizer, 0)
    next(model.parameters())
    return [bool(parameter.isnan().any()) for parameter in held]


@pytest.mark.parametrize("stage", [0, 2])
def test_the_first_parameter_waits_for_its_unit_alone(ranks, stage):
    """The root's two layers are back, and the blocks, which are stepped later, are not."""
    for is_nan in ranks(2).run(first_parameter, stage):
        assert not any([*is_nan[:2], *is_nan[-2:]]) and all(is_nan[2:-2])


def read_alone(stage: int, offload):
    with slow_workers(SLOW_S):
        model, optimizer = make(stage, offload)
    read = {}
    for step in range(3):
        learn(model, optimizer, step)
        if rank() == step % 2:
            found = model.state_dict() if step < 2 else dict(model.named_parameters())
            read |= {f"{step} {name}": value.detach().clone() for name, value in found.items()}
    learn(model, optimizer, 3)
    return {**read, **full(model)}


def test_one_rank_reads_while_the_others_go_on(ranks):
    with_and_without(ranks, read_alone, WHOLE)


def read_alone_then_together(stage: int, offload, folder: Path):
    import zerolite

    model, optimizer = make(stage, offload)
    for step, together in enumerate(
        [
            lambda: zerolite.save(model, folder / "step", optimizer),
            lambda: zerolite.load(model, folder / "step", optimizer),
            lambda: zerolite.export(model, folder / "export"),
            lambda: optimizer.clip_grad_norm_(1.0),
            lambda: full(model),
        ]
    ):
        learn(model, optimizer, step)
        if rank() == 0:
            next(model.parameters())
        together()
    return full(model)


def test_one_rank_reads_before_what_all_do_together(ranks, tmp_path):
    """`model.device` of transformers is such a read."""
    with_and_without(ranks, read_alone_then_together, WHOLE[1:], options=(tmp_path,))


def run_a_part(stage: int, offload):
    with slow_workers(SLOW_S):
        model, optimizer = make(stage, offload)
    read = {}
    for step in range(3):
        learn(model, optimizer, step)
        with torch.no_grad():
            model.blocks[step](torch.ones(2, 7))
        found = [model.state_dict(), dict(model.named_parameters()), full(model)][step]
        read |= {f"{step} {name}": value.detach().clone() for name, value in found.items()}
    return read


def test_a_part_run_alone_leaves_nothing_unread(ranks):
    """What its forward has passed over is back, too, when somebody asks."""
    with_and_without(ranks, run_a_part, WHOLE)


def step_inside(stage: int, offload):
    import zerolite

    with slow_workers(SLOW_S):
        model, optimizer = make(stage, offload)
    with zerolite.full_params(model, writeback=True):
        learn(model, optimizer, 0)
    learn(model, optimizer, 1)
    return full(model)


def test_a_step_inside_full_params_survives_writeback(ranks):
    with_and_without(ranks, step_inside, WHOLE)


def add_parameter():
    import zerolite

    model, _ = make(1, Offload())
    model.more = nn.Parameter(torch.ones(3))
    return [name for name, _ in model.named_parameters()][0], zerolite.AdamW(model.parameters())


def test_a_parameter_added_later_is_refused_by_the_optimizer_and_not_by_the_model(ranks):
    with pytest.raises(Exception, match="ValueError.*belongs to no sharded model"):
        ranks(1).run(add_parameter)


# gradients and optimizers


def odd_life(stage: int, offload):
    """Gradients that no step follows, steps without gradients, clipping by hand, leftovers of no_sync."""
    import zerolite

    with slow_workers(SLOW_S / 4):
        model, optimizer = make(stage, offload, weight_decay=0.1)
    norms = []
    backward(model, 0)
    optimizer.zero_grad()  # no step
    backward(model, 1)
    norms.append(optimizer.clip_grad_norm_(0.5))
    optimizer.step()
    optimizer.step()  # on the same gradients, as they were clipped
    norms.append(optimizer.grad_norm)
    optimizer.zero_grad()
    optimizer.step()  # on none: nothing changes
    norms.append(optimizer.grad_norm)
    with zerolite.no_sync(model):
        backward(model, 2)
    optimizer.step()  # reduces first
    backward(model, 3)  # adds to what is there
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()  # on zeros: decays
    norms.append(optimizer.grad_norm)
    model.zero_grad()
    x = torch.ones(2, 7) * (1 + rank())
    squared(model.blocks[1](x), x).backward()  # one block alone
    optimizer.step()
    model.zero_grad(set_to_none=False)
    backward(model, 4)
    norms.append(optimizer.clip_grad_norm_(0.25))
    norms.append(optimizer.clip_grad_norm_(0.5))  # of the clipped ones: changes nothing
    optimizer.step()
    return {**full(model), "norms": torch.tensor(norms, dtype=torch.float64)}


def test_steps_and_gradients_in_odd_orders(ranks):
    with_and_without(ranks, odd_life)


def two_optimizers(stage: int, offload, way: str):
    import zerolite

    model = zerolite.shard(drawn(Stack).float(), stage=stage, offload=offload)
    up, down = model.blocks[0].up.weight, model.blocks[0].down.weight
    first, second = {
        "the same parameters": (list(model.parameters()), list(model.parameters())),
        "one bucket": ([up, model.first.weight], [down]),
        "one bucket, the second later": ([up, model.first.weight], [down]),
    }[way]
    optimizers = [zerolite.AdamW(first, lr=1e-2)]
    for step in range(4):
        if len(optimizers) == 1 and (step == 2 or "later" not in way):
            optimizers.append(zerolite.AdamW(second, lr=3e-2))
        backward(model, step)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    return full(model)


@pytest.mark.parametrize("way", ["the same parameters", "one bucket", "one bucket, the second later"])
def test_two_optimizers_have_states_of_their_own(ranks, way):
    with_and_without(ranks, two_optimizers, [(1, Offload()), (3, Offload())], options=(way,))


def rebuild(stage: int, offload, rule: str, is_kept: bool):
    import zerolite

    with slow_workers(SLOW_S, is_fixed=True):
        model, optimizer = make(stage, offload)
    parameters = list(model.parameters())
    for step in range(2):
        learn(model, optimizer, step)
    kept = optimizer if is_kept else None
    del optimizer
    gc.collect()  # its states are still being stepped, and their memory is free
    optimizer = getattr(zerolite, rule)(parameters, lr=1e-3)
    for step in range(2, 4):
        learn(model, optimizer, step)
    del kept
    return full(model)


@pytest.mark.parametrize("rule, is_kept", [("AdamW", True), ("AdamW", False), ("Lion", False), ("Lamb", False)])
def test_a_new_optimizer_on_the_same_model_starts_anew(ranks, tmp_path, rule, is_kept):
    layouts = [(1, Offload()), (2, Offload(path=str(tmp_path))), (3, STREAMED)]
    with_and_without(ranks, rebuild, layouts, options=(rule, is_kept))


def two_models(stage: int, offload):
    with slow_workers(SLOW_S / 4):
        pairs = [make(stage, offload, drawn(Stack, seed).float(), lr=lr) for seed, lr in ((0, 1e-2), (1, 3e-2))]
    for step in range(3):
        for model, optimizer in pairs:
            learn(model, optimizer, step)
    return {f"{i} {name}": value for i, (model, _) in enumerate(pairs) for name, value in full(model).items()}


def test_two_models_in_one_process(ranks):
    with_and_without(ranks, two_models, [(1, Offload()), (3, STREAMED)])


def load_dicts(stage: int, offload, dtype: torch.dtype):
    """State dicts of model and optimizer, loaded while the workers are at it, decide what the next step starts from."""
    import zerolite

    def start(seed: int):
        model = drawn(Stack, seed)
        model = zerolite.shard(model, stage=stage, offload=offload, precision=zerolite.Precision(dtype, FP32))
        return model, zerolite.AdamW(model.parameters(), lr=1e-2)

    with slow_workers(SLOW_S):
        model, optimizer = start(0)
        other, other_optimizer = start(1)
    for step in range(2):
        learn(model, optimizer, step)
        learn(other, other_optimizer, step)
    other.load_state_dict(model.state_dict())
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    learn(model, optimizer, 2)
    learn(other, other_optimizer, 2)
    assert_same_bits(full(other), full(model))
    masters = [bucket.shard.values().clone() for unit in other._zerolite.units for bucket in unit.buckets]
    truths = [bucket.shard.values().clone() for unit in model._zerolite.units for bucket in unit.buckets]
    assert all(map(torch.equal, masters, truths))
    return full(other)


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_state_dicts_that_are_loaded_take_effect_on_the_host(ranks, dtype):
    results = [ranks(2).run(load_dicts, stage, offload, dtype)[0] for stage, offload in WHOLE]
    plain = ranks(2).run(load_dicts, 1, None, dtype)[0]
    for result in results:
        assert_same_bits(result, results[0])
        if dtype != torch.bfloat16:  # ties
            assert_same_bits(result, plain)


# Inf and NaN


def poisoned(stage: int, offload, bad: float, clip: float | None, accumulation: int):
    """(what the second of three steps said on this rank, states before and after it, the end)."""

    with slow_workers(SLOW_S / 4):
        model, optimizer = make(stage, offload, max_grad_norm=clip)
    states, messages = [], []
    for step in range(3):
        for micro in range(accumulation):
            x, y = (tensor.float() for tensor in data(rank(), 10 * step + micro))
            loss = squared(model(x), y)
            if step == 1 and micro == 0 and rank() == 1:
                loss = loss + model.blocks[1].norm(x[:, :1].expand(-1, 7)).sum() * bad
            loss.backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        messages.append([str(warning.message) for warning in caught])
        assert optimizer.step_was_skipped == (step == 1) == (not math.isfinite(optimizer.grad_norm))
        model._zerolite.fetch()
        states.append(state(model, optimizer))
        optimizer.zero_grad()
    return messages, states, full(model)


@pytest.mark.parametrize("bad, clip, accumulation", [(math.inf, None, 1), (math.nan, 0.5, 2), (-math.inf, 0.5, 1)])
def test_inf_or_nan_on_one_rank_changes_nothing_on_any(ranks, bad, clip, accumulation):
    expected = ranks(2).run(poisoned, 1, None, bad, clip, accumulation)
    for stage, offload in LAYOUTS:
        for (messages, states, end), (_, _, truth) in zip(
            ranks(2).run(poisoned, stage, offload, bad, clip, accumulation), expected, strict=True
        ):
            assert messages[0] == messages[2] == [] and len(messages[1]) == 1
            assert "skipped on every rank" in messages[1][0] and "blocks.1" in messages[1][0]
            assert_same_bits(states[1], states[0])
            assert not all(torch.equal(states[2][key], value) for key, value in states[1].items())
            assert_same_bits(end, truth)


# the end


def build_and_drop(times: int, offload: Offload):
    """(processes, open files, mapped arenas) at first, after one life, and after `times` more."""

    def count() -> tuple[int, int, int]:
        gc.collect()
        maps = Path("/proc/self/maps").read_text().count("memfd:zerolite")
        return len(psutil.Process().children(recursive=True)), len(os.listdir("/proc/self/fd")), maps

    def named(*processes) -> set[str]:
        """Files of /dev/shm that these processes map: what a SIGKILL would leave there."""
        maps = "".join(Path(f"/proc/{process}/maps").read_text() for process in processes)
        return {line[line.index("/dev/shm/") :] for line in maps.splitlines() if "/dev/shm/" in line}

    others, (children, _, arenas) = named("self"), count()  # of an earlier test: torch's, and a graph's that lives on

    def life() -> None:
        model, optimizer = make(3, offload)
        learn(model, optimizer, 0)  # the workers are stepping when it goes
        assert count()[0] == children + 2 and count()[2] > arenas
        assert named("self", *(child.pid for child in psutil.Process().children())) <= others

    first = count()
    life()
    before = count()
    for _ in range(times):
        life()
    return first, before, count()


def test_a_model_that_nobody_holds_takes_its_workers_files_and_memory_along(ranks, tmp_path):
    for offload in (Offload(workers=2, threads=1), Offload(workers=2, threads=1, path=str(tmp_path))):
        for first, before, after in ranks(1).run(build_and_drop, 10, offload):
            assert (before[0], before[2]) == (after[0], after[2]) == (first[0], first[2])
            assert after[1] <= before[1]  # what earlier tests had open may be closed on the way
    assert not list(tmp_path.iterdir())
