"""A plan is what the run takes: model states to the byte, peaks within five percent, what is sent to the byte."""

from __future__ import annotations

import itertools

import pytest
import torch
from live_bytes import LENGTH, MODELS, OFFLOADS, ROWS, VOCAB, Case, LiveBytes, counted_run
from mutants import replaced
from test_bytes import storages
from torch.distributed._tools.mem_tracker import MemTracker

import zerolite
from zerolite.memory import activations
from zerolite.memory.plan import Plan, plan_of
from zerolite.memory.subject import Inputs, Subject

FEW_BYTES = 8192  # a rank: numbers that ranks exchange before a step, header messages of gloo


def planned(case: Case, world: int) -> Plan:
    subject = Subject(case.build(), case.adapt)
    inputs = Inputs(ROWS, LENGTH, checkpointing=case.checkpointing)
    return plan_of(subject, case.stage, world, case.placement, case.precision, inputs=inputs, device="cpu")


def compare(case: Case, world: int, ranks) -> None:
    plan = planned(case, world)
    for counted in ranks(world).run(counted_run, case):
        usage = counted.usage
        assert plan.states["parameters"] == usage.parameters_bytes
        assert plan.states["gradients"] == usage.gradients_bytes
        assert plan.states["master"] + plan.states["moments"] == usage.optimizer_bytes
        assert (plan.arena_bytes, plan.file_bytes) == (usage.host_bytes, usage.file_bytes)
        if world > 1:
            assert {"reduce": plan.traffic.reduce_bytes, "gather": plan.traffic.gather_bytes} == counted.sent
        for phase, peak in counted.peaks.items():
            assert plan.peaks[phase].total_bytes == pytest.approx(peak, rel=0.05, abs=FEW_BYTES * world), phase


# Each family, stage, kind of offload, dtype, checkpointing, adapter and number of ranks at least once.
CASES = [
    (1, Case("llama", 0)),
    (2, Case("llama", 1, "none", "bf16", checkpointing=True)),
    (2, Case("llama", 3, "parameters", "bf16", lora=True)),
    (2, Case("llama", 1, budget=1_000_000)),
    (4, Case("gpt2", 3, "none", "fp32", checkpointing=True)),
    (1, Case("gpt2", 2, "optimizer", "bf16", lora=True)),
    (2, Case("t5", 3, "optimizer", "fp32")),
    (4, Case("mixtral", 2, "none", "bf16")),
    (2, Case("mixtral", 0, "optimizer", "fp32")),
]


@pytest.mark.parametrize("world, case", CASES, ids=str)
def test_a_plan_is_what_the_run_takes(ranks, world, case):
    """States, arena and what is sent are equal, and every phase's peak is within five percent."""
    compare(case, world, ranks)


def grid() -> list[tuple[int, Case]]:
    axes = [1, 2, 4], MODELS, range(4), OFFLOADS, ["fp32", "bf16"], [False, True], [False, True]
    rows = [(world, Case(*rest)) for world, *rest in itertools.product(*axes)]
    return [(world, case) for world, case in rows if case.stage == 3 or case.offload != "parameters"]


@pytest.mark.slow
@pytest.mark.parametrize("world, case", grid(), ids=str)
def test_the_whole_grid(ranks, world, case):
    compare(case, world, ranks)


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_skipped_blocks_change_nothing(name, checkpointing):
    """A profile in which alike blocks are skipped has the moments of one in which all are run."""
    subject = Subject(MODELS[name]())
    inputs = Inputs(ROWS, LENGTH, checkpointing)
    skipped = subject.profile(None, inputs)
    with replaced(activations, "alike_runs", lambda plans: []):
        whole = Subject(MODELS[name]()).profile(None, inputs)
    assert skipped == whole
    assert not any("forward" in vars(module) for module in subject.model.modules())


def test_the_count_is_that_of_the_garbage_collector_and_of_torch():
    """`LiveBytes` at rest sees the storages that the collector finds, and its peak is that of torch's MemTracker."""
    torch.manual_seed(0)
    before = storages()
    live, tokens = LiveBytes(), torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    model = MODELS["llama"]()
    made = sum(size for address, size in storages().items() if address not in before)
    with live.watching():
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    now = sum(size for address, size in storages().items() if address not in before)
    assert live.current_bytes == now - made > 0
    tracker = MemTracker()
    tracker.track_external(model, tokens)
    for parameter in model.parameters():
        parameter.grad = None
    with tracker:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    theirs = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] - made - tokens.nbytes
    assert live.take_peak() == pytest.approx(theirs, rel=0.01)


def test_a_plan_leaves_the_model_and_its_kernels_as_they_were():
    """Training after a plan is the same, dropout's masks included: no fake tensor is kept anywhere."""

    def losses(is_planned: bool) -> list[float]:
        case = Case("llama", lora=True)
        model = case.build()
        zerolite.adapters.add_lora(model, r=4, dropout=0.5)
        if is_planned:
            state = [(name, tensor.data_ptr()) for name, tensor in model.state_dict().items()]
            zerolite.plan(model, 3, 4, batch=ROWS, length=LENGTH, checkpointing=True)
            assert state == [(name, tensor.data_ptr()) for name, tensor in model.state_dict().items()]
            assert all(parameter.grad is None for parameter in model.parameters())
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
        torch.manual_seed(1)
        found = []
        for _ in range(2):
            tokens = torch.randint(0, VOCAB, (ROWS, LENGTH))
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    assert losses(True) == losses(False)
