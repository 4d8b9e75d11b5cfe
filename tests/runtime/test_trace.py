"""Labels of phases: nothing where nobody asks; in torch's profiler and the rank's Chrome trace where somebody does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from traces import assert_nested, spans
from zerolite_kernels import cpu
from zerolite_kernels.cpu.command import FILL, Command

from zerolite.offload.arena import Arena
from zerolite.offload.pool import Pool
from zerolite.runtime import chrome_trace, trace
from zerolite.runtime import device as devices
from zerolite.runtime.device import Cpu


@pytest.fixture
def folder(tmp_path):
    """Where a trace is being recorded."""
    trace.start(tmp_path)
    yield tmp_path
    trace.stop()


def python_calls(function) -> list[str]:
    """The names of the Python functions that `function` calls."""
    names = []
    sys.setprofile(lambda frame, event, _: names.append(frame.f_code.co_name) if event == "call" else None)
    try:
        function()
    finally:
        sys.setprofile(None)
    return names[1:]


def use_both() -> None:
    with trace.phase("all-gather", "layers.0"), trace.phase("H2D", "layers.0"):
        end = trace.flight("all-gather", "layers.0")
    end()


def test_off_is_one_call_and_no_object():
    """A phase that nobody asked for is one Python call, the end of a flight none, and nothing is made."""
    assert trace.recording is None
    assert trace.phase("all-gather", "a") is trace.phase("D2H", "b") is trace.OFF
    assert trace.flight("all-gather", "a") is trace.nothing
    assert python_calls(use_both) == ["phase", "phase", "flight"]


class Told:
    """A watcher that keeps what it is told."""

    def __init__(self):
        self.labels = []

    def begin(self, kind: str, name: str) -> None:
        self.labels.append(f"{kind} ({name})")

    def end(self, kind: str, name: str) -> None:
        self.labels.append(f"end of {kind} ({name})")


@pytest.mark.parametrize("is_recorded", [False, True])
def test_a_watcher_is_told_of_begins_and_ends(is_recorded, request):
    """Also beside a recording, which misses nothing; a flight that ends after it has left is not told."""
    folder = request.getfixturevalue("folder") if is_recorded else None
    told = Told()
    trace.watch(told)
    try:
        use_both()
        late = trace.flight("D2H", "layers.1")
    finally:
        trace.watch(None)
    late()
    use_both()
    phases = ["all-gather (layers.0)", "H2D (layers.0)", "all-gather (layers.0)"]
    ends = ["end of H2D (layers.0)", "end of all-gather (layers.0)", "end of all-gather (layers.0)"]
    assert told.labels == [*phases, *ends, "D2H (layers.1)"]
    if folder is not None:
        trace.write()
        names = [event["name"] for event in json.loads((folder / "rank-00000.json").read_text())["traceEvents"]]
        assert names.count("all-gather (layers.0)") == 4 and names.count("D2H (layers.1)") == 1
    else:
        assert trace.phase("forward", "a") is trace.OFF


def test_off_lets_exceptions_pass():
    with pytest.raises(ValueError, match="mine"), trace.phase("all-gather", "a"):
        raise ValueError("mine")


def test_a_profiler_sees_the_phases_from_its_start_to_its_end():
    """It may be started at any time, in a phase too, and no environment variable is needed."""
    use_both()
    with trace.phase("optimizer step", "AdamW"), profile(activities=[ProfilerActivity.CPU]) as profiler:
        use_both()
        with pytest.raises(ValueError), trace.phase("reduce-scatter", "layers.1"):
            raise ValueError
        with trace.phase("reduce-scatter", "layers.1"):
            torch.ones(3)
    use_both()
    counts = {event.key: event.count for event in profiler.key_averages() if event.key.startswith("zerolite::")}
    assert counts == {
        "zerolite::all-gather (layers.0)": 1,
        "zerolite::H2D (layers.0)": 1,
        "zerolite::reduce-scatter (layers.1)": 2,
    }


def test_phases_and_flights_have_tracks_of_their_own(folder):
    """Phases nest on their thread's track; flights that cross lie on different ones, which later flights use again."""
    before = time.monotonic_ns() / 1000
    use_both()
    first, second = trace.flight("all-gather", "a"), trace.flight("all-gather", "b")
    first()
    third = trace.flight("all-gather", "c")
    second()
    third()
    with pytest.raises(ValueError), trace.phase("D2H", "d"):
        raise ValueError
    trace.write()
    after = time.monotonic_ns() / 1000
    found = spans(folder)
    assert_nested(found)
    assert all(before <= span["ts"] <= span["ts"] + span["dur"] <= after for span in found)
    assert {(span["name"], span["cat"], span["pid"], span["tid"]) for span in found} == {
        ("all-gather (layers.0)", "all-gather", "rank 0", "MainThread"),
        ("H2D (layers.0)", "H2D", "rank 0", "MainThread"),
        ("D2H (d)", "D2H", "rank 0", "MainThread"),
        ("all-gather (layers.0)", "all-gather", "rank 0", "all-gather in flight"),
        ("all-gather (a)", "all-gather", "rank 0", "all-gather in flight"),
        ("all-gather (b)", "all-gather", "rank 0", "all-gather in flight (2)"),
        ("all-gather (c)", "all-gather", "rank 0", "all-gather in flight"),
    }


def test_a_long_run_writes_by_itself(tmp_path, monkeypatch):
    """Complete JSON now and then, with the newest spans only where there are too many."""
    monkeypatch.setattr(chrome_trace, "WRITE_SECONDS", 0.05)
    monkeypatch.setattr(chrome_trace, "MAX_SPANS", 10)
    trace.start(tmp_path)
    for number in range(20):
        with trace.phase("D2H", str(number)):
            time.sleep(0.02)
    written = [int(span["args"]["name"]) for span in spans(tmp_path)]
    assert len(written) <= 10 and max(written) > 3
    trace.stop()
    assert [int(span["args"]["name"]) for span in spans(tmp_path)] == list(range(10, 20))
    assert [path.name for path in tmp_path.iterdir()] == ["rank-00000.json"]


@pytest.mark.parametrize("end", ["sys.exit(3)", "raise KeyError", "trace.write(); os._exit(0)"])
def test_the_environment_variable_asks(tmp_path, end):
    """The file is there after each kind of end, under the rank's number."""
    code = f"import os, sys\nfrom zerolite.runtime import trace\nwith trace.phase('D2H', 'a'): pass\n{end}"
    environment = os.environ | {"ZEROLITE_TRACE": str(tmp_path / "new" / "folder"), "RANK": "7"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    subprocess.run([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL, timeout=120)
    (span,) = spans(tmp_path / "new" / "folder", rank=7)
    assert (span["name"], span["pid"]) == ("D2H (a)", "rank 7")


@pytest.mark.skipif(cpu.path() is None, reason="the host kernels were not built")
def test_workers_have_a_span_a_command_and_thread(folder):
    """More commands than their ring holds: none is missing, in order, on the tracks of two processes."""
    arena = Arena(Cpu())
    pool = Pool(arena.fd, 2, sorted(os.sched_getaffinity(0))[:1] * 3)
    field = arena.allocate(1 << 16, torch.float32)
    fill = Command(op=FILL, numel=field.nbytes, last=field.nbytes, gradient=field.offset)
    begin = time.monotonic_ns() / 1000
    for number in range(9):
        pool.submit([fill] * 1000, f"placing {number}", arena.nbytes)
    pool.close()  # it writes what the workers had still to do
    end = time.monotonic_ns() / 1000
    found = spans(folder)
    assert_nested(found)
    tracks = {("rank 0 worker 0", "thread 0"), ("rank 0 worker 1", "thread 1"), ("rank 0 worker 1", "thread 2")}
    assert {(span["pid"], span["tid"]) for span in found} == tracks
    for track in tracks:
        mine = [span for span in found if (span["pid"], span["tid"]) == track]
        assert [span["name"] for span in mine] == [f"worker fill (placing {n})" for n in range(9) for _ in range(1000)]
        assert begin <= mine[0]["ts"] and mine[-1]["ts"] + mine[-1]["dur"] <= end
        assert all(
            before["ts"] + before["dur"] <= after["ts"] + 0.01 for before, after in zip(mine, mine[1:], strict=False)
        )


def test_a_fork_writes_nothing(folder):
    """A data loader's process has the trainer's spans, and must not replace its file."""
    with trace.phase("D2H", "a"):
        pass
    if os.fork() == 0:
        trace.write()
        os._exit(0)
    os.wait()
    assert not list(folder.iterdir())
    trace.write()
    assert json.loads((folder / "rank-00000.json").read_text())["traceEvents"]


class Event:
    """A stand-in for a CUDA event: it happens 1 ms after the one before, and is known to have happened when told."""

    count, happened = 0, 0

    def __init__(self):
        Event.count += 1
        self.number = Event.count

    def synchronize(self) -> None:
        Event.happened = max(Event.happened, self.number)

    def query(self) -> bool:
        return self.number <= Event.happened

    def elapsed_time(self, other: Event) -> float:
        assert self.query() and other.query()
        return float(other.number - self.number)


def test_streams_of_a_gpu_have_tracks(folder, monkeypatch):
    """A phase is also a span of the stream that was current, by the device's clock, once its events have happened."""
    monkeypatch.setattr(trace._streams, "_origin", None)
    monkeypatch.setattr(devices, "timed_event", lambda: (7, Event()))
    with trace.phase("optimizer step", "AdamW"), trace.phase("H2D", "layers.0", 64):  # events 1 to 4
        pass
    trace.flight("all-gather", "layers.0")()  # 5 and 6
    trace.write()
    assert not [span for span in spans(folder) if "stream" in span["tid"]]
    Event.happened = 100
    trace.write()
    inner, outer, flown = [span for span in spans(folder) if "stream" in span["tid"]]
    assert [span["tid"] for span in (inner, outer, flown)] == ["stream 7"] * 2 + ["stream, all-gather in flight"]
    assert [span["dur"] for span in (inner, outer, flown)] == [1000, 3000, 1000]
    assert inner["ts"] - outer["ts"] == pytest.approx(1000) and flown["ts"] - outer["ts"] == pytest.approx(4000)
    assert inner["args"] == {"name": "layers.0", "bytes": 64}
