"""What a tracker counts over real steps: model states as planned, to the byte, and peaks as storages live, by kind."""

from __future__ import annotations

import pytest
import torch
from live_bytes import LENGTH, ROWS, VOCAB, Case, LiveBytes
from mutants import mutated
from test_plan import FEW_BYTES, planned

import zerolite
from zerolite.engine.engine import engine_of
from zerolite.memory.state_bytes import KINDS, PHASES
from zerolite.memory.track import Tracker
from zerolite.memory.tracked_states import TrackedStates
from zerolite.runtime import trace


def tokens_of() -> torch.Tensor:
    return torch.randint(0, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))


def built(case: Case):
    """(model, optimizer), sharded."""
    model = case.build().train()
    case.adapt(model)
    if case.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = zerolite.shard(model, stage=case.stage, offload=case.placement, precision=case.precision)
    return model, zerolite.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)


def loss_of(model) -> torch.Tensor:
    tokens = tokens_of()
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


def finish(model) -> None:
    """Workers are done."""
    for parameter in model.parameters():
        parameter.detach()


def tracked_run(case: Case) -> dict:
    """Two steps under a tracker and, around it, the tests' own count; of the second step."""
    model, optimizer = built(case)
    live = LiveBytes()
    engine = engine_of(model)
    for tensor in TrackedStates(engine, optimizer).tensors():
        live.add(tensor)
    with live.watching(), zerolite.track(model, optimizer) as tracker:
        for _ in range(2):
            peaks = dict.fromkeys(PHASES, 0)
            live.take_peak()
            for _ in range(case.accumulation):
                loss = loss_of(model)
                peaks["forward"] = max(peaks["forward"], live.take_peak())
                loss.backward()
                del loss
                peaks["backward"] = max(peaks["backward"], live.take_peak())
            usage = zerolite.measure(model, optimizer)
            optimizer.step()
            peaks["step"] = live.take_peak()
            optimizer.zero_grad()
    finish(model)
    step = tracker.steps[-1]
    found = {phase: dict(peak.bytes_of) for phase, peak in step.peaks.items()}
    return dict(usage=usage, live=peaks, states=step.states, peaks=found, host=step.host, num_steps=step.number)


CASES = [
    (1, Case("llama", 0)),
    (2, Case("llama", 1, "none", "bf16", checkpointing=True)),
    (2, Case("llama", 3, "parameters", "bf16", lora=True)),
    (2, Case("gpt2", 3)),
    (1, Case("gpt2", 2, "optimizer", "bf16", lora=True)),
    (2, Case("llama", 2, "optimizer", "bf16", accumulation=2)),
]


@pytest.mark.parametrize(
    "world, case",
    [*CASES, pytest.param(2, Case("mixtral", 3, "none", "bf16", accumulation=2), marks=pytest.mark.slow)],
    ids=str,
)
def test_states_are_the_plans_and_peaks_are_what_lives(ranks, world, case):
    """Model states to the byte as planned and measured; each phase's peak is the count around it, kinds add up to it.

    By kind, nothing is further from the plan than five percent of the whole.
    """
    plan = planned(case, world)
    for found in ranks(world).run(tracked_run, case):
        usage, states = found["usage"], found["states"]
        assert states == plan.states
        assert states["gradients"] == usage.gradients_bytes
        assert (found["host"].arena_bytes, found["host"].file_bytes) == (usage.host_bytes, usage.file_bytes)
        assert found["host"].arena == plan.host
        assert found["num_steps"] == 2
        for phase in PHASES:
            by_kind = found["peaks"][phase]
            total = sum(by_kind.values())
            assert total == pytest.approx(found["live"][phase], abs=8), phase  # the loss's own gradient
            assert total == pytest.approx(plan.peaks[phase].total_bytes, rel=0.05, abs=FEW_BYTES * world), phase
            tolerance = 0.05 * total + FEW_BYTES * world
            far = {kind for kind in KINDS if abs(by_kind[kind] - plan.peaks[phase].bytes_of[kind]) > tolerance}
            assert not far, (phase, by_kind, plan.peaks[phase])
            assert min(by_kind.values()) >= 0


def no_sync_run() -> list[tuple[int, int]]:
    model, optimizer = built(Case(stage=2))
    found = []
    with zerolite.track(model, optimizer) as tracker:
        for micro in range(2):
            with zerolite.no_sync(model, enabled=micro == 0):
                loss_of(model).backward()
            found.append((tracker.states["gradients"], zerolite.measure(model, optimizer).gradients_bytes))
        optimizer.step()
    return found


def test_inside_no_sync_a_whole_gradient_is_counted(ranks):
    """What `measure` counts, after the local and after the reduced backward."""
    for (local, measured), (reduced, measured_after) in ranks(2).run(no_sync_run):
        assert (local, reduced) == (measured, measured_after)
        assert local > 1.9 * reduced


def lived_through() -> dict:
    """Phases as a script goes on; the tracker is asked for what lives now."""
    model, optimizer = built(Case(stage=3))
    with zerolite.track(model, optimizer) as tracker:
        at_start = tracker.current.bytes_of
        with torch.no_grad():
            loss_of(model)
        evaluated = set(tracker.all_peaks)
        loss = loss_of(model)
        after_forward = tracker.current.bytes_of
        loss.backward()
        after_backward = tracker.current.bytes_of
        with zerolite.full_params(model):
            whole = tracker.current.bytes_of
        optimizer.step()
        optimizer.zero_grad()
        kept = torch.zeros(1000)
        at_end = tracker.current.bytes_of
        del loss, kept
    return {
        "start": at_start, "evaluated": evaluated, "forward": after_forward, "backward": after_backward,
        "whole": whole, "end": at_end, "states": tracker.states, "last": tracker.current.bytes_of,
        "labels": {(region.kind, region.name) for region in tracker.regions},
    }  # fmt: skip


def test_what_lives_now_by_kind_while_a_script_goes_on(ranks):
    """Evaluation is outside; activations live from forward to backward, gradients until they are cleared."""
    numel = sum(parameter.numel() for parameter in Case().build().parameters())
    for found in ranks(2).run(lived_through):
        assert found["evaluated"] == {"outside"}
        start, forward, backward, end = (found[name] for name in ("start", "forward", "backward", "end"))
        assert {kind for kind, nbytes in start.items() if nbytes} == {"parameters", "moments"}
        assert forward["activations"] > 100_000 and forward["gradients"] == 0
        assert backward["activations"] == 0 and backward["gradients"] == found["states"]["gradients"]
        assert found["whole"]["units in flight"] == pytest.approx(4 * numel, rel=0.05)
        assert end["gradients"] == end["units in flight"] == end["step scratch"] == 0
        assert 4000 <= end["other"] <= 4000 + FEW_BYTES
        assert sum(found["last"].values()) <= sum(end.values())
        kinds = {kind for kind, _ in found["labels"]}
        assert kinds == {"forward", "backward", "reduce-scatter", "optimizer step"}
        assert {name for kind, name in found["labels"] if kind == "backward"} >= {"(root)", "model.layers.4"}


def workers_run() -> tuple[int, int, int]:
    model, optimizer = built(Case(stage=1, offload="optimizer"))
    with zerolite.track(model, optimizer) as tracker:
        loss_of(model).backward()
        optimizer.step()
    usage = tracker.host
    finish(model)
    return usage.process_bytes, usage.children_bytes, usage.pinned_bytes


def test_the_host_has_the_process_and_its_workers(ranks):
    """PSS of both; on the CPU nothing is pinned."""
    ((process, children, pinned),) = ranks(1).run(workers_run)
    assert process > 10 * 2**20 and children > 2**20 and pinned == 0


class Allocator:
    """The interface of a GPU's counter over `LiveBytes`: the whole process counts, and more is reserved."""

    device_bytes = 1 << 40

    def __init__(self, live: LiveBytes, calls: list[str]):
        self.live, self.calls = live, calls

    @property
    def current_bytes(self) -> int:
        return self.live.current_bytes

    @property
    def reserved_bytes(self) -> int:
        return self.live.current_bytes + 4096

    def take_peak(self) -> int:
        return self.live.take_peak()

    def start_history(self) -> None:
        self.calls.append("start")

    def write_history(self, path: str) -> None:
        self.calls.append(path)


def allocator_run() -> dict:
    live, calls = LiveBytes(), []
    with live.watching():
        model, optimizer = built(Case("gpt2", 3, "none", "bf16"))
        before = torch.zeros(5000)
        engine_of(model).device.memory_counter = lambda: Allocator(live, calls)
        with zerolite.track(model, optimizer, snapshot="snapshot.pickle") as tracker:
            for _ in range(2):
                loss_of(model).backward()
                optimizer.step()
                optimizer.zero_grad()
    del before
    return {
        "peaks": {phase: dict(peak.bytes_of) for phase, peak in tracker.steps[-1].peaks.items()},
        "reserved": tracker.reserved_bytes, "current": tracker.current.total_bytes, "calls": calls,
    }  # fmt: skip


def test_an_allocator_that_counts_the_process_is_split_alike(ranks):
    """What was there before is "other", the rest are the kinds of a count of storages; a snapshot is written."""
    found, plain = ranks(1).run(allocator_run)[0], ranks(1).run(tracked_run, Case("gpt2", 3, "none", "bf16"))[0]
    assert found["calls"] == ["start", "snapshot.pickle"]
    assert found["reserved"] == found["current"] + 4096
    for phase in PHASES:
        assert found["peaks"][phase].pop("other") >= 5000 * 4
        plain["peaks"][phase].pop("other")
        assert found["peaks"][phase] == pytest.approx(plain["peaks"][phase], abs=16), phase


@pytest.mark.gpu
def test_on_a_gpu_the_allocator_counts(tmp_path):
    """Blocks of 512 bytes apart, model states are the plan's, and the peak is the allocator's."""
    case = Case("llama", 1, "none", "bf16")
    model, optimizer = built(case)
    device = next(model.parameters()).device
    tokens = tokens_of().to(device)
    with zerolite.track(model, optimizer, snapshot=tmp_path / "snapshot.pickle") as tracker:
        for _ in range(2):
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert tracker.states == planned(case, 1).states
    assert tracker.reserved_bytes >= tracker.peak_bytes > sum(tracker.states.values())
    assert (tmp_path / "snapshot.pickle").stat().st_size > 0


def mutant_run(owner_name: str, name: str, old: str, new: str) -> list[dict]:
    owner = {"Tracker": Tracker, "TrackedStates": TrackedStates}[owner_name]
    with mutated(owner, name, old, new):
        found = tracked_run(Case(stage=3))
    return [found["peaks"], found["live"], found["states"]]


MUTANTS = [
    ("Tracker", "_resize", "self._live.resized(storage)", "pass"),
    ("TrackedStates", "resized", "+=", "-="),
    ("TrackedStates", "at_end_of_backward", "gradient_bytes", "kept_gradient_bytes and buffer_bytes"),
]


@pytest.mark.parametrize("owner, name, old, new", MUTANTS, ids=[mutant[1] for mutant in MUTANTS])
def test_the_comparison_sees_a_tracker_that_is_wrong(ranks, owner, name, old, new):
    """With one of its lines broken the count, or a kind, is not the plan's any more."""
    plan = planned(Case(stage=3), 2)
    for peaks, live, states in ranks(2).run(mutant_run, owner, name, old, new):
        totals_differ = any(abs(sum(peaks[phase].values()) - live[phase]) > 8 for phase in PHASES)
        flight = peaks["backward"]["units in flight"]
        kinds_differ = flight != pytest.approx(plan.peaks["backward"].bytes_of["units in flight"], rel=0.05)
        assert totals_differ or kinds_differ or states != plan.states


def test_off_is_off():
    """Without a tracker labels are what they were: one call, one object."""
    assert trace.watcher is None
    assert trace.phase("forward", "a") is trace.OFF and trace.flight("forward", "a") is trace.nothing
    assert torch.UntypedStorage.resize_ is torch._C.StorageBase.resize_
