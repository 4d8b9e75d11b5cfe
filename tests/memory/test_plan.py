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
from zerolite.engine import build
from zerolite.memory import activations
from zerolite.memory import subject as subject_module
from zerolite.memory.plan import Plan, plan_of
from zerolite.memory.skipped_blocks import alike_runs
from zerolite.memory.subject import Inputs, Subject
from zerolite.offload import arena
from zerolite.offload.placement import Placement
from zerolite.shards import units as shard_units
from zerolite.shards.layout import Partition

FEW_BYTES = 8192  # a rank: numbers that ranks exchange before a step, header messages of gloo


def planned(case: Case, world: int) -> Plan:
    subject = Subject(case.build(), case.adapt)
    inputs = Inputs(ROWS, LENGTH, checkpointing=case.checkpointing)
    options = {"inputs": inputs, "accumulation": case.accumulation, "no_sync": case.no_sync, "device": "cpu"}
    options["optimizer"] = case.optimizer
    return plan_of(subject, case.stage, world, case.placement, case.precision, **options)


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
    (2, Case("llama", 2, "optimizer", "bf16", accumulation=2)),
    (2, Case("llama", 3, accumulation=2)),
    (2, Case("llama", 2, "none", "bf16", accumulation=2, no_sync=True)),
    (2, Case("gpt2", 3, "parameters", accumulation=3, no_sync=True)),
    (2, Case("llama", 2, "none", "fp16")),
    (2, Case("llama", 3, "optimizer", optimizer="Lamb")),
    (4, Case("gpt2", 1, "none", "bf16", optimizer="Lamb")),
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


@pytest.mark.parametrize("name, checkpointing", [("llama", True), ("t5", False)])
def test_skipped_blocks_change_nothing(name, checkpointing):
    """A profile in which alike blocks are skipped has the moments of one in which all are run."""
    subject = Subject(MODELS[name]())
    inputs = Inputs(ROWS, LENGTH, checkpointing)
    skipped = subject.profile(None, inputs)
    with replaced(activations, "alike_runs", lambda plans: []):
        whole = Subject(MODELS[name]()).profile(None, inputs)
    assert skipped == whole
    assert not any("forward" in vars(module) for module in subject.model.modules())
    assert not any(getattr(module, "gradient_checkpointing", False) for module in subject.model.modules())


def test_blocks_that_differ_in_a_switch_are_not_alike():
    """Every other block is recomputed: none is skipped, though their parameters are alike."""
    subject = Subject(MODELS["llama"]())
    assert alike_runs(subject.unit_plans(None))
    for block in subject.model.model.layers[::2]:
        block.gradient_checkpointing = True
    assert not alike_runs(Subject(subject.model).unit_plans(None))


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


def usage_of(states: str, path: str | None, rule: str, dtype: torch.dtype):
    model = MODELS["llama"]()
    offload = zerolite.Offload(states=states, path=path)
    model = zerolite.shard(model, 2, offload=offload, precision=zerolite.Precision(dtype))
    optimizer = getattr(zerolite, rule)(model.parameters(), lr=1e-3)
    return zerolite.measure(model, optimizer)


@pytest.mark.parametrize(
    "states, has_path, rule, dtype",
    [
        ("int8", False, "AdamW", torch.bfloat16),
        ("int8", True, "AdamW", torch.bfloat16),
        ("bf16", True, "Lion", torch.float16),
        ("bf16", False, "Adam", torch.float32),
    ],
)
def test_formats_of_states_are_counted_to_the_byte(ranks, tmp_path, states, has_path, rule, dtype):
    """In the arena and on a drive, with one state and with two, each dtype with what it keeps of its master."""
    path = str(tmp_path) if has_path else None
    offload = zerolite.Offload(states=states, path=path)
    plan = zerolite.plan(MODELS["llama"](), 2, 2, offload, zerolite.Precision(dtype), optimizer=rule, batch=None)
    for usage in ranks(2).run(usage_of, states, path, rule, dtype):
        assert (plan.arena_bytes, plan.file_bytes) == (usage.host_bytes, usage.file_bytes)


def test_loss_scaling_of_fp16_copies_what_the_model_returns():
    """Logits that a loss outside the model reads are there in fp32, too: so much more than in bf16, and no more."""
    peaks = {}
    for dtype in (torch.float16, torch.bfloat16):

        def step(model: torch.nn.Module) -> torch.Tensor:
            return model(input_ids=torch.zeros(ROWS, LENGTH, dtype=torch.int64), use_cache=False).logits.sum()

        plan = zerolite.plan(MODELS["gpt2"](), 0, precision=zerolite.Precision(dtype), step=step, device="cpu")
        peaks[dtype] = plan.peaks["forward"].total_bytes
    assert peaks[torch.float16] - peaks[torch.bfloat16] == pytest.approx(ROWS * LENGTH * VOCAB * 4, abs=8)


def test_tensor_parallelism_is_refused_by_name():
    model = MODELS["llama"]()
    with replaced(subject_module, "is_distributed", lambda parameter: parameter is model.lm_head.weight):
        with pytest.raises(ValueError, match=r"lm_head\.weight is a DTensor.*before parallelize_module"):
            zerolite.plan(model, 0, batch=None)


def test_a_plan_follows_the_engine_wherever_that_changes():
    """No second formula: with other buckets, pages or ranges in the engine's own functions, the plan is another."""

    def plan(offload=None) -> Plan:
        return zerolite.plan(MODELS["llama"](), 2, 4, offload, batch=None)

    before, offloaded = plan(), plan("cpu")
    with replaced(shard_units, "BUCKET_NUMEL", 5000):
        assert plan().traffic.num_collectives > 2 * before.traffic.num_collectives
    with replaced(arena, "PAGE_BYTES", 1 << 16):
        assert plan("cpu").arena_bytes > offloaded.arena_bytes and plan("cpu").arena_bytes % (1 << 16) == 0
    with replaced(Partition, "owned_range", lambda partition, layout, rank: layout.range):
        assert plan().states["moments"] == 4 * before.states["moments"]
    with replaced(build, "reduce_dtype", lambda precision, dtype: torch.float64):
        assert plan().traffic.reduce_bytes == 2 * before.traffic.reduce_bytes
    with replaced(Placement, "keeps_gradient_on_device", lambda placement, unit, group: True):
        assert plan("cpu").arena_bytes == 0 and plan("cpu").states == before.states
