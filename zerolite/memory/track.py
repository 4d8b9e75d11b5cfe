"""`zerolite.track`: where the memory of real steps goes, by kind and phase, on the labels of the traces.

    with zerolite.track(model, optimizer) as tracker:
        train()
    print(tracker)
    tracker.write_page("memory.html")

[Note: how a peak is split]
At each label of the trace (a unit's forward begins, a reduction has started, ...), and before a unit is gathered or
freed, the counter tells what lives, and the most that lived since the last label. Model states and gradient buffers are
read off the engine's buckets, as for a plan; what is left are activations or, behind the last block, logits; in the
step it is scratch. On the GPU the counter is torch's allocator. On the CPU storages are counted as operations make
them, without what lived before; so numbers are exact, and each operation costs some microseconds.
"""

import time
from collections import deque
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd import Variable

from zerolite.engine.compiled import compiled_forwards
from zerolite.engine.engine import Engine, engine_of, find_engine
from zerolite.memory import track_pictures, track_texts
from zerolite.memory.host_memory import HostReader, HostUsage
from zerolite.memory.live_storages import LiveStorages, Resize, resizes_through
from zerolite.memory.out_of_memory import answer
from zerolite.memory.plan import Plan
from zerolite.memory.state_bytes import Peak
from zerolite.memory.track_records import OUTSIDE, TRACKED_KINDS, Point, Region, StepUsage, larger, named
from zerolite.memory.tracked_states import TrackedStates
from zerolite.optim.base import ShardedOptimizer
from zerolite.runtime import trace

MARKED = frozenset({"forward", "backward", "recompute", "reduce-scatter", "optimizer step"})  # kinds of labels
UNITS_WALK = frozenset({"forward", "backward", "recompute"})
MAX_POINTS, MAX_STEPS = 20_000, 10_000  # the newest; a step of a 32-layer model has about 300 points


class _Here(NamedTuple):
    """Bytes that come and go of model states, at one label."""

    gathered: int
    gradients: int
    buffers: int


class Tracker:
    """Counts while its `with` block runs; what it found stays readable. Of this rank; nothing is collective."""

    def __init__(self, engine: Engine, optimizer: ShardedOptimizer, plan: Plan | None, snapshot: str | None):
        self.plan, self.snapshot = plan, snapshot
        self.model_name = type(engine.model).__name__
        self.steps: deque[StepUsage] = deque(maxlen=MAX_STEPS)
        self.peaks: dict[str, Peak] = {}  # by phase, over all finished steps; a phase that was not entered is missing
        self.points: deque[Point] = deque(maxlen=MAX_POINTS)
        self.regions: deque[Region] = deque(maxlen=MAX_POINTS)
        self.states: dict[str, int] = {}  # at the end of the last backward
        self.phase = OUTSIDE
        self.reserved_bytes = 0  # what the GPU's allocator has from the driver, at the end
        self.last_label = ""
        self.engine, self.optimizer = engine, optimizer
        self._stack: ExitStack | None = None
        self._reader: HostReader | None = None  # since it runs
        self._is_done = False
        self._step_peaks: dict[str, Peak] = {}

    # Begin and end #

    def __enter__(self) -> "Tracker":
        """ValueError where a tracker runs already in this process, and for one that has run."""
        if self._is_done:
            raise ValueError("this tracker has run: make another one, zerolite.track(model, optimizer), for more steps")
        if trace.watcher is not None:
            raise ValueError("a tracker runs already in this process: leave its `with` block before another one begins")
        self._counted = TrackedStates(self.engine, self.optimizer)
        self._reader = HostReader(self.engine, self._counted.buckets)
        self._root = self.engine.units[0].name
        self._open: dict[tuple[str, str], list[int]] = {}  # begins, ns
        self._step_depth = 0
        self._base_bytes, self._is_tail = 0, False  # activations before the head; whether it runs: walk.py
        self._here, self._allocator = self._read(), self.engine.device.memory_counter()
        with ExitStack() as stack:
            if self._allocator is None:
                self._live = LiveStorages()
                for tensor in self._counted.tensors():
                    self._live.add(tensor)
                stack.callback(self._live.clear)
                stack.enter_context(self._live)
            elif self.snapshot is not None:
                self._allocator.start_history()
                stack.callback(self._allocator.write_history, self.snapshot)
            self._counter = self._allocator or self._live
            self._counter.take_peak()
            self._other_bytes = self._counter.current_bytes - self._counted.fixed_total_bytes - sum(self._here)
            stack.enter_context(resizes_through(self._resize))
            trace.watch(self)
            stack.callback(trace.watch, None)
            self._stack = stack.pop_all()
        self._step_began = time.monotonic_ns()
        return self

    def __exit__(self, kind, error: BaseException | None, where) -> None:
        assert self._stack is not None, "`with` has entered"
        stack, self._stack = self._stack, None
        with stack:  # whatever is read here, it closes
            self._mark()
            self._keep_step_peaks()
            self._is_done = True
            if self._allocator is not None:
                self.reserved_bytes = self._allocator.reserved_bytes
        if error is not None:
            answer(error, self)

    # What is known #

    @property
    def is_running(self) -> bool:
        return self._stack is not None

    @property
    def current(self) -> Peak:
        """Bytes by kind on the device: now, or after the `with` block at its end. ValueError before it."""
        if self.is_running:
            self._counted.refresh()
            self._mark()
        if not self.points:
            raise ValueError("this tracker has not run: enter it, `with zerolite.track(model, optimizer) as tracker:`")
        return self.points[-1].usage

    @property
    def host(self) -> HostUsage | None:
        """What this rank took of its host when it was last read; None before the `with` block."""
        return self._reader.last if self._reader is not None else None

    @property
    def peak_bytes(self) -> int:
        """The most that lived at once on the device, in any phase so far."""
        return max((peak.total_bytes for peak in self.all_peaks.values()), default=0)

    @property
    def all_peaks(self) -> dict[str, Peak]:
        """By phase, the present step included."""
        return larger(self.peaks, self._step_peaks)

    def __str__(self) -> str:
        return track_texts.table(self)

    def as_dict(self) -> dict:
        """Plain numbers and texts, for JSON; bytes, seconds."""
        return track_texts.as_dict(self)

    def write_timeline(self, path: str | Path) -> None:
        """A PNG of the last steps: bytes by kind over time. ModuleNotFoundError without matplotlib."""
        track_pictures.write_timeline(self, Path(path))

    def write_page(self, path: str | Path) -> None:
        """One HTML file that needs nothing else: timeline, peaks by kind and phase, steps, host."""
        track_pictures.write_page(self, Path(path))

    # What the trace tells #

    def begin(self, kind: str, name: str) -> None:
        """A label begins."""
        if kind not in MARKED:
            return
        self._read_unit(name)
        self._mark()
        self._open.setdefault((kind, name), []).append(self.points[-1].time)
        self.last_label = f"{kind} ({name})"
        if kind in UNITS_WALK and name != self._root:
            self._is_tail = False
        if kind == "forward" and torch.is_grad_enabled():
            self.phase = "forward"  # until backward: what lies between is the loss
        elif kind in ("backward", "recompute") and self.phase != "backward":
            self.phase = "backward"
            # Behind `Engine.finish_backward`, which was queued before.
            Variable._execution_engine.queue_callback(self._end_backward)
        elif kind == "optimizer step":
            self._step_depth += 1
            self.phase = "step"

    def end(self, kind: str, name: str) -> None:
        """A label ends."""
        if kind not in MARKED:
            return
        self._read_unit(name)
        self._mark()
        point = self.points[-1]
        self._close(kind, name, point.time)
        if kind == "forward" and name != self._root:
            activations, logits = TRACKED_KINDS.index("activations"), TRACKED_KINDS.index("logits")
            self._base_bytes, self._is_tail = point.bytes_of[activations] + point.bytes_of[logits], True
        elif kind == "optimizer step":
            self._step_depth -= 1
            if self._step_depth == 0:
                self.phase = OUTSIDE
                self._end_step(point.time)

    def _close(self, kind: str, name: str, end: int) -> None:
        """The label that began first of its kind and name has ended, if one has begun."""
        begins = self._open.get((kind, name))
        if begins:
            self.regions.append(Region(kind, name, begins.pop(0), end))

    def _end_backward(self) -> None:
        """The outermost backward has ended, reductions included."""
        if self.is_running and self.phase == "backward":
            self.states = self._counted.at_end_of_backward()
            self._mark()
            self._close("backward", self._root, self.points[-1].time)  # no hook tells where the root's ends
            self.phase = OUTSIDE

    def _end_step(self, now: int) -> None:
        number = self.steps[-1].number + 1 if self.steps else 1
        seconds, self._step_began = (now - self._step_began) / 1e9, now
        assert self._reader is not None, "labels are told while it runs"
        usage = StepUsage(number, seconds, self._step_peaks, self.states, self._reader.read_if_cheap(), now)
        self.steps.append(usage)
        self._keep_step_peaks()

    def _keep_step_peaks(self) -> None:
        self.peaks, self._step_peaks = self.all_peaks, {}

    # Counting #

    def _resize(self, resize: Resize, storage: torch.UntypedStorage, nbytes: int) -> None:
        self._mark()
        resize(storage, nbytes)
        if self._allocator is None:
            self._live.resized(storage)
        self._counted.resized(storage, nbytes)

    def _read_unit(self, name: str) -> None:
        if self.phase in ("backward", "step"):
            self._counted.refresh_unit(name)
        elif name == self._root:
            self._counted.refresh()

    def _read(self) -> _Here:
        counted = self._counted
        return _Here(counted.gathered_bytes, counted.gradients_bytes, counted.buffers_bytes)

    def _mark(self) -> None:
        """End the interval since the last mark. See [Note: how a peak is split]."""
        before, here = self._here, self._read()
        peak = self._counter.take_peak()
        known = self._step_peaks.get(self.phase)
        if known is None or peak > known.total_bytes:
            self._step_peaks[self.phase] = named(self._split(peak, max(before, here, key=sum)))
        self._here = here
        now = self._split(self._counter.current_bytes, here)
        self.points.append(Point(time.monotonic_ns(), self.phase, now, peak))

    def _split(self, total: int, here: _Here) -> tuple[int, ...]:
        """`total` by kind, in the order of TRACKED_KINDS."""
        fixed = self._counted.fixed
        rest = total - self._counted.fixed_total_bytes - sum(here) - self._other_bytes
        activations = logits = scratch = 0
        other = self._other_bytes
        if self.phase == OUTSIDE or rest < 0:  # less: of what the process had before, something is gone
            other += rest
        elif self.phase == "step":
            scratch = rest
        else:
            logits = max(0, rest - self._base_bytes) if self._is_tail else 0
            activations = rest - logits
        states = fixed["parameters"], fixed["master"], fixed["moments"], here.gradients, here.gathered, here.buffers
        return *states, activations, logits, scratch, other


def track(
    model: nn.Module,
    optimizer: ShardedOptimizer,
    *,
    plan: Plan | None = None,
    snapshot: str | Path | None = None,
) -> Tracker:
    """A context manager that counts this rank's memory over the steps inside, by kind and phase. Not collective.

        with zerolite.track(model, optimizer) as tracker:
            ...                          # any number of steps, accumulation and no_sync included
        print(tracker)                   # peaks, bytes; tracker.steps, tracker.peaks, tracker.states, tracker.current
        tracker.write_page("memory.html"); tracker.write_timeline("memory.png")

    model: sharded. optimizer: of its parameters. plan: of the same run, shown beside what was measured.
    snapshot: a file to be written at the end: torch's memory snapshot (a pickle, for pytorch.org/memory_viz), on a GPU.
    Kinds are those of `zerolite.plan`. An out-of-memory error that passes through the block keeps its type and gets a
    note: the kinds, the plan beside them, and what to change.
    On a GPU torch's peak statistics are reset at every label. On the CPU what operations make inside the block is
    counted, 10 to 40 microseconds each: under two percent of a step of a large model, much of a tiny one's.
    Raises ValueError for a model that is not sharded, an optimizer of another one, on the CPU for snapshot= and for a
    compiled model and, when entered, where a tracker runs already; TypeError for other optimizers.
    """
    if not isinstance(model, nn.Module) or find_engine(model) is None:
        raise ValueError(
            f"track counts a sharded model, and this {type(model).__name__} is none: call zerolite.shard(model, "
            "stage=...) first; before that, zerolite.plan tells what a run will take"
        )
    engine = engine_of(model)
    if not isinstance(optimizer, ShardedOptimizer):
        raise TypeError(f"track takes an optimizer of zerolite, as zerolite.AdamW; got {type(optimizer).__name__}")
    if optimizer._engine is not engine:
        raise ValueError(f"this {type(optimizer).__name__} steps the parameters of another model than the one given")
    if engine.device.memory_counter() is None:
        if snapshot is not None:
            raise ValueError("snapshot= is of torch's GPU allocator, and the model lies on the CPU: leave it out")
        if hasattr(model, "_orig_mod") or any(True for _ in compiled_forwards(engine.model)):
            raise ValueError(
                "on the CPU operations are counted one by one, and torch never again compiles what has once run so: "
                "track the model before it is compiled"
            )
    return Tracker(engine, optimizer, plan, str(snapshot) if snapshot is not None else None)
