"""What goes wrong under a tracker: out of memory is answered, mistakes are refused by name, nothing stays behind."""

from __future__ import annotations

import gc
import re
import resource
import weakref

import psutil
import pytest
import torch
from live_bytes import LENGTH, ROWS, VOCAB, Case, LiveBytes
from test_track import built, finish, loss_of, tracked_run
from torch.utils._python_dispatch import _len_torch_dispatch_stack

import zerolite
from zerolite.runtime import trace


class Limit(LiveBytes):
    """A device of so many bytes: the operation that passes them raises what torch would."""

    def __init__(self, limit_bytes: int, error: type[BaseException]):
        super().__init__()
        self.limit_bytes, self.error = limit_bytes, error

    def add(self, tensor: torch.Tensor) -> None:
        super().add(tensor)
        if self.current_bytes > self.limit_bytes:
            raise self.error(f"artificial limit of {self.limit_bytes} bytes")


def failed_run(case: Case, limit_bytes: int, error: type[BaseException]) -> tuple[str, list[str], int]:
    """The type of what a step under a limit raised, its notes, and the peak that the tracker has kept."""
    model, optimizer = built(case)
    limit = Limit(limit_bytes, error)
    try:
        with zerolite.track(model, optimizer) as tracker, limit.watching():
            for _ in range(2):
                loss_of(model).backward()
                optimizer.step()
                optimizer.zero_grad()
    except BaseException as raised:
        check_nothing_is_left()
        return type(raised).__name__, getattr(raised, "__notes__", []), tracker.peak_bytes
    raise AssertionError("the limit was not reached")


def check_nothing_is_left() -> None:
    assert trace.watcher is None and trace.phase("forward", "a") is trace.OFF
    assert torch.UntypedStorage.resize_ is torch._C.StorageBase.resize_
    assert _len_torch_dispatch_stack() == 0


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError], ids=["OutOfMemoryError", "MemoryError"])
def test_out_of_memory_is_answered(ranks, error):
    """The error keeps its type; its note has the phase, the kinds, the plan beside them and what takes less."""
    for name, notes, peak in ranks(2).run(failed_run, Case(stage=0), 1_500_000, error):
        assert name == error.__name__ and peak > 1_500_000
        (note,) = notes
        assert re.search(r"out of memory in (forward|backward) of step 1, after (forward|backward) \(", note)
        head = next(line for line in note.splitlines() if "on this device" in line)
        assert re.search(r"MiB on this device +(forward|backward) +(forward|backward), planned", head)
        row = {line.split()[0]: line.split()[-2:] for line in note.splitlines() if line.startswith("  ")}
        assert row["parameters"][0] == row["parameters"][1] and float(row["activations"][0]) > 0.5
        assert "planned without activations" in note and "this process (PSS)" in note
        changes = note.split("what takes less:\n")[1]
        assert re.search(r"shard\(stage=1\): .* less", changes) and re.search(r"shard\(stage=3\): .* less", changes)
        assert "half the rows" in changes and "activation checkpointing" in changes and "LoRA" in changes
        assert "offload" not in changes  # this device's memory is the host's


@pytest.mark.parametrize("stage", [1, 3])
def test_what_is_said_to_take_less_does(ranks, stage):
    """Runs of both configurations differ by what the note says, within a tenth."""
    (_, (note,), _), _ = ranks(2).run(failed_run, Case(stage=0), 1_500_000, torch.OutOfMemoryError)
    number, unit = re.search(rf"shard\(stage={stage}\): ([\d.]+) (KiB|MiB) less", note).groups()
    told = float(number) * {"KiB": 2**10, "MiB": 2**20}[unit]
    peaks = []
    for one in (0, stage):
        found = ranks(2).run(tracked_run, Case(stage=one))[0]["peaks"]
        peaks.append(max(sum(bytes_of.values()) for bytes_of in found.values()))
    assert peaks[0] - peaks[1] == pytest.approx(told, rel=0.1)


def real_limit_run() -> tuple[str, str, list[str]]:
    """The address space of this process is limited for a while."""
    model, optimizer = built(Case())
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 2**28, before[1]))
    try:
        with zerolite.track(model, optimizer):
            tokens = torch.zeros(20_000, LENGTH, dtype=torch.int64)
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    except RuntimeError as raised:
        return type(raised).__name__, str(raised), getattr(raised, "__notes__", [])
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    raise AssertionError("the limit was not reached")


def test_what_the_cpus_allocator_raises_is_answered(ranks):
    """`RuntimeError: ... can't allocate memory`, of a process that may not grow."""
    ((name, text, notes),) = ranks(1).run(real_limit_run)
    assert name == "RuntimeError" and "can't allocate memory" in text
    assert "out of memory in forward of step 1" in notes[0] and "half the rows" in notes[0]


def planned_beside_run() -> str:
    case = Case(stage=1)
    plan = zerolite.plan(case.build(), 1, 1, batch=ROWS, length=LENGTH, device="cpu")
    model, optimizer = built(case)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with pytest.raises(torch.OutOfMemoryError) as caught:
        with zerolite.track(model, optimizer, plan=plan):
            loss_of(model)
            raise torch.OutOfMemoryError("by hand")
    return caught.value.__notes__[0]


def test_a_plan_that_was_given_stands_beside(ranks):
    """With its activations; checkpointing that is on is not advised."""
    (note,) = ranks(1).run(planned_beside_run)
    row = next(line.split() for line in note.splitlines() if line.startswith("  activations"))
    assert 0 < float(row[1]) < float(row[2])
    assert "planned without activations" not in note and "activation checkpointing" not in note


def other_error_run(is_in_backward: bool) -> list[str]:
    model, optimizer = built(Case(stage=3, offload="optimizer"))
    is_gone = None

    def fail(*arguments):
        raise RuntimeError("the user's own")

    block = model.model.layers[2]
    with pytest.raises(RuntimeError, match="the user's own") as caught:
        with zerolite.track(model, optimizer) as tracker:
            is_gone = weakref.ref(tracker._live)
            loss = loss_of(model)
            if is_in_backward:
                hook = block.register_full_backward_pre_hook(fail)
                loss_of(model).backward()
            hook = block.register_forward_pre_hook(fail)
            loss_of(model)
    check_nothing_is_left()
    hook.remove()
    notes = getattr(caught.value, "__notes__", [])
    del caught, loss
    with zerolite.track(model, optimizer) as again:
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {"forward", "backward", "step"} <= set(again.all_peaks) and not again.regions[-1].name == ""
    finish(model)
    tracker = None
    gc.collect()
    assert is_gone() is None, "storages that live on keep the count of a tracker that is gone"
    return notes


@pytest.mark.parametrize("is_in_backward", [False, True], ids=["forward", "backward"])
def test_any_other_error_passes_as_it_is(ranks, is_in_backward):
    """It has no note, no hook and no count stays, and the next tracker works."""
    for notes in ranks(2).run(other_error_run, is_in_backward):
        assert notes == []


def refusals() -> None:
    model, optimizer = built(Case())
    other, other_optimizer = built(Case())
    plain = Case().build()
    with pytest.raises(ValueError, match=r"this LlamaForCausalLM is none: call zerolite.shard"):
        zerolite.track(plain, optimizer)
    with pytest.raises(TypeError, match="track takes an optimizer of zerolite, as zerolite.AdamW; got SGD"):
        zerolite.track(model, torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1))
    with pytest.raises(ValueError, match="steps the parameters of another model"):
        zerolite.track(model, other_optimizer)
    with pytest.raises(ValueError, match="snapshot= is of torch's GPU allocator"):
        zerolite.track(model, optimizer, snapshot="a.pickle")
    zerolite.compile(other)
    with pytest.raises(ValueError, match="track the model before it is compiled"):
        zerolite.track(other, other_optimizer)
    other, other_optimizer = built(Case())
    tracker = zerolite.track(model, optimizer)
    with pytest.raises(ValueError, match="has not run"):
        _ = tracker.current
    assert "0 steps" in str(tracker) and tracker.host is None
    with pytest.raises(ValueError, match="nothing was tracked yet"):
        tracker.write_page("never.html")
    with tracker:
        with (
            pytest.raises(ValueError, match="a tracker runs already in this process"),
            zerolite.track(other, other_optimizer),
        ):
            pass
        with pytest.raises(ValueError, match="a tracker runs already in this process"), tracker:
            pass
        assert trace.watcher is tracker
        loss_of(model)
    with pytest.raises(ValueError, match="this tracker has run: make another one"), tracker:
        pass
    check_nothing_is_left()


def test_mistakes_are_refused_by_name(ranks):
    """Models that are not sharded, foreign optimizers, and trackers inside each other or used twice."""
    ranks(1).run(refusals)


def two_models_run() -> int:
    """Another sharded model works inside the block, and lies outside of the count of states."""
    model, optimizer = built(Case(stage=3))
    other, _ = built(Case("gpt2", 3))
    tokens = torch.randint(0, VOCAB, (ROWS, LENGTH))
    with zerolite.track(model, optimizer) as tracker:
        for _ in range(2):
            with torch.no_grad():
                other(input_ids=tokens, use_cache=False)
            loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()
    return tracker.states["parameters"] - zerolite.measure(model, optimizer).parameters_bytes


def test_a_second_model_does_not_disturb(ranks):
    assert ranks(2).run(two_models_run) == [0, 0]
