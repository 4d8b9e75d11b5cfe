"""What offload takes, where it takes it, and what it refuses."""

from __future__ import annotations

import dataclasses
import os
import re

import pytest
import torch
from delays import slow_workers
from models import layouts_of, llama
from saved import attempt
from torch import nn
from zerolite_kernels import cpu
from zerolite_kernels.cpu import state_file

from zerolite import Offload, Precision
from zerolite.shards.units import BUCKET_NUMEL

pytestmark = pytest.mark.skipif(cpu.path() is None, reason="the host kernels were not built")

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
WORLD, PAGE = 2, 4096


def usage(stage: int, precision: Precision, offload: Offload, rule: str, backwards: int):
    import zerolite

    model = zerolite.shard(llama(hidden=64), stage=stage, precision=precision, offload=offload)
    optimizer = getattr(zerolite, rule)(model.parameters(), lr=1e-3)
    ids = torch.arange(3, 11)[None]
    for _ in range(2):
        for _ in range(backwards):
            model(input_ids=ids).logits.float().square().mean().backward()
        end = zerolite.measure(model, optimizer)
        optimizer.step()
        optimizer.zero_grad()
    with zerolite.full_params(model):
        pass
    return end, zerolite.measure(model, optimizer)


def owned_and_buckets(stage: int) -> tuple[int, int]:
    """(elements with padding that a rank owns, buckets)."""
    model = llama(hidden=64)
    layouts = layouts_of(model, WORLD, BUCKET_NUMEL)
    return sum(layout.numel if stage == 0 else layout.shard_numel for layout in layouts), len(layouts)


INT8 = 2 * (1 + 4 / 128)


@pytest.mark.parametrize(
    "width, stage, precision, offload, rule, backwards",
    [
        (4 + 4 + 8, 0, Precision(FP32, FP32), Offload(), "AdamW", 1),
        (4 + 4 + 8, 2, Precision(FP32, FP32), Offload(workers=2, threads=2), "AdamW", 1),
        (4 + 4 + 8, 3, Precision(FP32, FP32), Offload(parameters=True), "AdamW", 1),
        (4 + 4 + 4, 1, Precision(FP32, FP32), Offload(), "Lion", 1),
        (2 + 2 + 2 + 8, 2, Precision(BF16, BF16), Offload(), "AdamW", 1),
        (2 + 2 + 2 + 4, 3, Precision(BF16, BF16), Offload(states="bf16"), "Lamb", 1),
        (2 + 2 + 2 + INT8, 3, Precision(BF16, BF16), Offload(states="int8", parameters=True), "AdamW", 1),
        (4 + 2 + 2 + 8, 1, Precision(BF16, FP32), Offload(), "AdamW", 1),
        (2 + 2 + 2 + 8 + 4, 1, Precision(BF16, BF16), Offload(), "AdamW", 2),  # and the sum over backwards
        (2 + 2 + 4 + 8, 2, Precision(FP16, FP16), Offload(), "Adam", 1),
    ],
)
def test_host_bytes_are_the_formula(ranks, width, stage, precision, offload, rule, backwards):
    """A gradient, a parameter, its master's other bits and the states: what a rank owns, to the page."""
    owned, buckets = owned_and_buckets(stage)
    for end, after in ranks(WORLD).run(usage, stage, precision, offload, rule, backwards):
        fields = 8 * buckets + 8  # of a bucket, each up to its page; and what workers leave sums in
        assert width * owned <= end.host_bytes <= width * owned + fields * PAGE
        assert after.host_bytes == end.host_bytes and after.file_bytes == end.file_bytes == 0
        # On the device stay the parameters alone, and gradients no longer than a backward.
        parameters = 0 if offload.parameters else precision.param.itemsize * owned * (WORLD if stage in (1, 2) else 1)
        assert (end.parameters_bytes, end.optimizer_bytes, end.gradients_bytes) == (parameters, 0, 0)
        assert after == end


def test_states_on_a_drive_leave_memory(ranks, tmp_path):
    owned, buckets = owned_and_buckets(2)
    arguments = (2, Precision(BF16, BF16), Offload(path=str(tmp_path)), "AdamW", 1)
    for end, _ in ranks(WORLD).run(usage, *arguments):
        assert 6 * owned <= end.host_bytes <= 6 * owned + (8 * buckets + 8) * PAGE
        assert 8 * owned <= end.file_bytes <= 8 * (owned + buckets * PAGE)  # pieces of whole 4096 elements
    assert not list(tmp_path.iterdir())


def half_on_host(budget: int):
    import zerolite

    model = zerolite.shard(llama(hidden=64), stage=1, offload=Offload(budget=budget))
    optimizer = zerolite.AdamW(model.parameters(), lr=1e-3)
    model(input_ids=torch.arange(3, 11)[None]).logits.square().mean().backward()
    used = zerolite.measure(model, optimizer)
    return used, [unit.buckets[0].shard.steps_in_background for unit in model._zerolite.units]


def test_a_budget_is_kept_and_used(ranks):
    """First units stay, as many as fit: never more bytes than the budget, and another unit would not fit."""
    owned, _ = owned_and_buckets(1)
    everything = owned * (4 * WORLD + 4 * WORLD + 8)
    for budget in (everything // 2, everything * 3 // 4, everything - 1, everything):
        for used, on_host in ranks(WORLD).run(half_on_host, budget):
            on_device = used.parameters_bytes + used.gradients_bytes + used.optimizer_bytes
            assert on_device <= budget and any(on_host) == (budget < everything)
            assert budget - on_device < 0.4 * everything, "a block of four"
            assert on_host == sorted(on_host)


def step_on_a_slow_drive(folder: str):
    import zerolite
    from zerolite.offload import pool

    with slow_workers(0.25, is_fixed=True):
        layer = nn.Linear(1, 8 * state_file.CHUNK_NUMEL, bias=False)
        before = layer.weight.detach().flatten().clone()
        model = zerolite.shard(layer, stage=2, offload=Offload(path=folder, threads=1))
    optimizer = zerolite.AdamW(model.parameters(), lr=0.5, weight_decay=0.0)
    patience, pool.STUCK_SECONDS = pool.STUCK_SECONDS, 1.2
    try:
        model(torch.ones(1, 1)).sum().backward()
        optimizer.step()
        return [(next(model.parameters()).flatten() - before + 0.5).abs().max().item()]
    finally:
        pool.STUCK_SECONDS = patience


def test_a_slow_drive_is_no_stuck_worker(ranks, tmp_path):
    """One command takes longer than the patience, its chunks do not."""
    assert ranks(1).run(step_on_a_slow_drive, str(tmp_path)) == [[pytest.approx(0.0, abs=1e-5)]]


# refusals


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"states": "fp8"}, "states fp32, bf16, int8 'fp8'"),
        ({"workers": 0}, "workers at least 1 0"),
        ({"threads": -2}, "threads at least 1 -2"),
        ({"workers": 1.5}, "workers 1.5"),
        ({"optimizer": False}, "optimizer=False not supported parameters=True"),
        ({"budget": "20 XB"}, "20GiB '20 XB'"),
        ({"budget": -1}, "20GiB -1"),
        ({"budget": "10GB", "parameters": True}, "parameters=True budget="),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_written(fields, words):
    with pytest.raises(ValueError) as caught:
        Offload(**fields)
    assert all(word in str(caught.value) for word in words.split()), caught.value


@pytest.mark.parametrize(
    "size, expected",
    [(512, 512), ("0", 0), ("1.5 KiB", 1536), ("20GiB", 20 * 2**30), ("2 gb", 2 * 10**9), (" 3MB", 3 * 10**6)],
)
def test_budgets_in_bytes(size, expected):
    from zerolite.config import parse_bytes

    assert parse_bytes(size) == expected


def shard_with(offload, stage: int, available: tuple[int, ...] = (), numel: int = 128):
    """available: what the machine says to have each time that it is asked."""
    import zerolite
    from zerolite.offload import arena

    def shard() -> nn.Module:
        return zerolite.shard(nn.Linear(1, numel, bias=False), stage=stage, offload=offload)

    measured = arena.available_bytes
    if available:
        arena.available_bytes = iter(available).__next__
    try:
        return attempt(lambda: zerolite.AdamW(shard().parameters()))
    finally:
        arena.available_bytes = measured


@pytest.mark.parametrize(
    "offload, stage, kind, words",
    [
        ("gpu", 1, "ValueError", "'gpu' \"cpu\" Offload"),
        (True, 1, "ValueError", 'True "cpu"'),
        (Offload(parameters=True), 2, "ValueError", "parameters=True stage=2 stage=3"),
        (Offload(budget="1KB"), 1, "ValueError", "1,000 bytes parameters stage 1"),
        (Offload(path="/no/such/folder"), 1, "ValueError", "/no/such/folder not a folder"),
        (Offload(path=__file__), 1, "ValueError", "test_offload_memory not a folder"),
        (Offload(path="/proc/self"), 1, "ValueError", "/proc/self direct I/O ext4"),
    ],
)
def test_what_cannot_be_is_refused_when_the_model_is_sharded(ranks, offload, stage, kind, words):
    for found, text in ranks(2).run(shard_with, offload, stage):
        assert found == kind and all(word in text for word in words.split()), (found, text)


ENOUGH, LITTLE = 2**30, 50 * 2**20


@pytest.mark.parametrize(
    "available, what", [((LITTLE,), "gradients and parameters"), ((ENOUGH, LITTLE), "AdamW's states")]
)
def test_too_little_host_memory_is_refused_with_both_sizes(ranks, available, what):
    """Before it is taken: 32 MiB a rank by `shard`, and as much again by the optimizer."""
    for kind, text in ranks(WORLD).run(shard_with, Offload(), 0, available, 2**22):
        assert kind == "ZeroliteError" and what in text and "2 ranks" in text, text
        assert re.findall(r"([\d.]+) GiB", text) == ["0.03", "0.06", "0.05"], text


def test_sizes_are_those_of_the_machine(ranks):
    """What is available is a part of the memory that there is."""
    from zerolite.offload.arena import available_bytes

    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < available_bytes() <= total


def test_an_offload_is_a_value():
    assert Offload() == Offload.of("cpu") and Offload.of(None) is None
    assert dataclasses.replace(Offload(), budget="1GiB").budget == "1GiB"
