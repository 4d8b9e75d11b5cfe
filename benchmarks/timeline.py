"""When a training step's parts run: thin wrappers around a sharded model's engine while a few steps are watched.

Rows: `phase` (forward, backward, step), `unit` (blocks that compute), `wait` (the compute stream, at the entrance of a
unit), `down` and `up` (copies between device and host), `host` (the trainer, sleeping until workers are done) and one
row a worker's thread. Work of the device is timed by CUDA events on the stream that does it, on the CPU by the clock.
"""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import DEVICE

SAMPLE_S = 2e-4  # between two looks at the workers' counts


@dataclass
class Span:
    row: str
    label: str
    phase: str  # in which it began
    start: float  # seconds since `Recorder.start`; events until `Recorder.stop`
    end: float


class Recorder:
    """Spans of what runs between `start` and `stop`."""

    def __init__(self, zero=None):
        """zero: the engine of a model that zerolite has sharded; else only phases are seen."""
        self.zero = zero
        self.spans: list[Span] = []
        self.bus_bytes = {"down": 0, "up": 0}
        self.is_on = False
        self.phase_now = ""
        self._open: dict = {}  # unit -> since when it computes
        self._submitted: list[tuple[int, str, float]] = []  # (number behind the last command, label, when)
        self._done: list[list[tuple[float, int]]] = []  # of each thread: (when seen, commands done)
        self._patched: list[tuple[object, str]] = []
        self._is_watching = False

    # Marks: the clock, or an event on the current stream #

    def _mark(self, on_device: bool = True):
        if on_device and DEVICE.type == "cuda":
            return torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))
        return time.perf_counter()

    def _seconds(self, mark) -> float:
        if isinstance(mark, float):
            return mark - self._origin
        return self._origin_event.elapsed_time(mark) / 1000

    @contextlib.contextmanager
    def _span(self, row: str, label: str, on_device: bool = True):
        phase, start = self.phase_now, self._mark(on_device)
        yield
        self.spans.append(Span(row, label, phase, start, self._mark(on_device)))

    @contextlib.contextmanager
    def phase(self, name: str):
        """A part of the step; while steps are watched, what the device does of it is waited for."""
        if not self.is_on:
            yield
            return
        self.phase_now = name
        with self._span("phase", name, on_device=False):
            yield
            DEVICE.synchronize()

    # Watching #

    def start(self) -> None:
        DEVICE.synchronize()
        self.is_on = True
        self._origin = time.perf_counter()
        if DEVICE.type == "cuda":
            self._origin_event = self._mark()
        if self.zero is None:
            return
        zero = self.zero
        for name in ("pre_forward", "pre_backward"):
            self._patch(zero, name, self._enter)
        for name in ("post_forward", "post_backward"):
            self._patch(zero, name, self._leave)
        if zero.host is not None:
            hosts = [bucket.flat.host for unit in zero.units for bucket in unit.buckets if bucket.flat.host is not None]
            fields = [field for host in hosts for field in (host.gradient, host.parameter) if field is not None]
            self._host_pointers = {field.values.untyped_storage().data_ptr() for field in fields}
            self._patch(zero.device, "copy", self._copy)
            self._patch(zero.host.pool, "submit", self._submit)
            self._patch(zero.host.pool, "wait", self._wait)
            self._done = [[] for _ in zero.host.pool._rows]
            self._is_watching = True
            self._watcher = threading.Thread(target=self._watch, daemon=True)
            self._watcher.start()

    def stop(self) -> None:
        DEVICE.synchronize()
        self.is_on = False
        if self._is_watching:
            self.zero.host.wait(self.zero.host.pool.submitted)
            self._is_watching = False
            self._watcher.join()
        for owner, name in self._patched:
            delattr(owner, name)  # what is behind it is the class's own
        for span in self.spans:
            span.start, span.end = self._seconds(span.start), self._seconds(span.end)
        self.spans += self._worker_spans()
        self.spans.sort(key=lambda span: span.start)

    def _patch(self, owner, name: str, around) -> None:
        whole = getattr(owner, name)
        setattr(owner, name, lambda *arguments: around(whole, *arguments))
        self._patched.append((owner, name))

    def _enter(self, whole, unit, *arguments) -> None:
        with self._span("wait", unit.name):
            whole(unit, *arguments)
        if not unit.is_root:
            self._open[unit] = self._mark()

    def _leave(self, whole, unit, *arguments) -> None:
        if unit in self._open:
            self.spans.append(Span("unit", unit.name, self.phase_now, self._open.pop(unit), self._mark()))
        whole(unit, *arguments)

    def _copy(self, whole, target: torch.Tensor, source: torch.Tensor) -> None:
        row = "down" if target.untyped_storage().data_ptr() in self._host_pointers else "up"
        self.bus_bytes[row] += target.nbytes
        with self._span(row, ""):
            whole(target, source)

    def _submit(self, whole, commands, label: str, arena_bytes: int) -> int:
        number = whole(commands, label, arena_bytes)
        self._submitted.append((number, label.split(" ")[0], time.perf_counter() - self._origin))
        return number

    def _wait(self, whole, number: int) -> None:
        with self._span("host", "waiting", on_device=False):
            whole(number)

    # Workers #

    def _watch(self) -> None:
        """In a thread of its own: when each thread's count of commands grows."""
        from zerolite_kernels.cpu_worker import DONE

        rows = self.zero.host.pool._rows
        while self._is_watching:
            for row, seen in zip(rows, self._done, strict=True):
                if not seen or row[DONE] != seen[-1][1]:
                    seen.append((time.perf_counter() - self._origin, row[DONE]))
            time.sleep(SAMPLE_S)

    def _worker_spans(self) -> list[Span]:
        """What each thread worked on: from when it was asked, or had done what came before, until its count says so."""
        spans = []
        for thread, seen in enumerate(self._done):
            end = 0.0
            for number, label, asked in self._submitted:
                done = next((when for when, count in seen if count >= number), None)
                if done is not None:
                    begin, end = max(asked, end), max(done, asked, end)
                    spans.append(Span(f"worker {thread}", label, "", begin, end))
        return spans


def exposed(spans: list[Span]) -> dict[str, float]:
    """Seconds of `step`, of waits at entrances of units in forward, and of both that the trainer slept for workers."""

    def total(row: str, *phases: str) -> float:
        return sum(span.end - span.start for span in spans if span.row == row and span.phase in phases)

    step = sum(span.end - span.start for span in spans if span.row == "phase" and span.label == "step")
    return {"step": step, "forward": total("wait", "forward"), "workers": total("host", "forward", "backward", "step")}


COLORS = {
    "forward": "#2563eb",
    "backward": "#7c3aed",
    "step": "#dc2626",
    "unit": "#93c5fd",
    "wait": "#f59e0b",
    "host": "#f59e0b",
    "down": "#0d9488",
    "up": "#65a30d",
    "stepping": "#c2410c",
    "adding": "#fdba74",
    "accumulating": "#a8a29e",
}
ROWS = {
    "phase": "forward, backward, step",
    "unit": "blocks compute",
    "wait": "blocks wait to begin",
    "down": "gradients: device to host",
    "up": "parameters: host to device",
    "host": "trainer sleeps for workers",
}


def draw(path: Path, title: str, panels: dict[str, list[Span]]) -> None:
    """One panel a contender, under each other and on one scale of milliseconds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    rows = {name: [*(row for row in ROWS if any(s.row == row for s in spans))] for name, spans in panels.items()}
    for name, spans in panels.items():
        rows[name] += sorted({span.row for span in spans if span.row.startswith("worker")})
    heights = [len(of_panel) for of_panel in rows.values()]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(13, 1.5 + 0.42 * sum(heights) + 0.7 * len(panels)), sharex=True, squeeze=False,
        layout="constrained", height_ratios=heights,
    )  # fmt: skip
    used = set()
    for axis, (name, spans) in zip(axes[:, 0], panels.items(), strict=True):
        for position, row in enumerate(rows[name]):
            mine = [span for span in spans if span.row == row]
            kinds = [span.label if span.label in COLORS else row for span in mine]
            used |= set(kinds)
            bars = [(1000 * span.start, 1000 * (span.end - span.start)) for span in mine]
            colors = [COLORS.get(kind, "#94a3b8") for kind in kinds]
            axis.broken_barh(bars, (position - 0.38, 0.76), facecolors=colors, edgecolors="white", linewidth=0.3)
        axis.set_yticks(range(len(rows[name])), [ROWS.get(row, row) for row in rows[name]])
        axis.invert_yaxis()
        axis.set_title(name, loc="left")
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("milliseconds")
    shown = {kind: color for kind, color in COLORS.items() if kind in used and kind not in ROWS}
    figure.legend(
        handles=[Patch(color=color, label=kind) for kind, color in shown.items()],
        loc="outside lower center",
        ncols=len(shown),
        frameon=False,
    )
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)
