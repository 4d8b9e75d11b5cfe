"""Labels of phases, for torch.profiler, for NVTX, and for a Chrome trace of this rank.

    with trace.phase("all-gather", "model.layers.3"):  # work of this thread
        ...
    end = trace.flight("D2H", "model.layers.3")  # work that goes on while the thread does something else
    ...
    end()

Kinds are all-gather, reduce-scatter, D2H, worker step, H2D and optimizer step; the name is the unit's.

While a torch profiler runs, a phase is a `record_function` and, where there is a GPU, an NVTX range, both called
"zerolite::all-gather (model.layers.3)". With `ZEROLITE_TRACE=folder` in the environment it is also a span of this
rank's Chrome trace, and so are flights and what workers do. Else both do nothing.

[Note: off costs one call]
A profiler may start at any time, so every phase asks for it. What it then gets is one object for all, whose methods
are C functions: off, a phase is one Python call, and the end of a flight none.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch.autograd import profiler

from zerolite.runtime import device as devices
from zerolite.runtime.chrome_trace import ChromeTrace, Span
from zerolite.runtime.stream_spans import StreamSpans

# Takes any arguments, does nothing, and is false, so that a context's exceptions pass; see [Note: off costs one call].
nothing: Callable[..., Any] = "".format


class _Off:
    __enter__ = nothing
    __exit__ = nothing


OFF = _Off()


class Watcher(Protocol):
    """Who is told of phases and flights of this process as they begin and end; it raises nothing."""

    def begin(self, kind: str, name: str) -> None: ...

    def end(self, kind: str, name: str) -> None: ...


recording: ChromeTrace | None = None  # changed by `start` and `stop` alone
watcher: Watcher | None = None  # changed by `watch` alone
_num_watches = 0  # calls of `watch`
_is_on = False  # whether there is one of the two
_streams = StreamSpans()


def phase(kind: str, name: str, nbytes: int = 0) -> AbstractContextManager[object]:
    """A context: what this thread does inside is of this kind, for the unit of this name; `nbytes` of a copy."""
    if not _is_on and not profiler._is_profiler_enabled:
        return OFF
    return _phase(kind, name, nbytes)


@contextmanager
def _phase(kind: str, name: str, nbytes: int) -> Iterator[None]:
    label, recorded, told = f"zerolite::{kind} ({name})", recording, watcher
    profiled = profiler.record_function(label) if profiler._is_profiler_enabled else OFF
    with profiled, devices.nvtx_range(label):
        if told is not None:
            told.begin(kind, name)
        begin, mark = time.monotonic_ns(), _streams.begin() if recorded is not None else None
        try:
            yield
        finally:
            if recorded is not None:
                _streams.end(mark, kind, name, nbytes)
                recorded.add(Span(recorded.this_thread(), kind, name, begin, time.monotonic_ns(), nbytes))
            if told is not None and told is watcher:
                told.end(kind, name)


def flight(kind: str, name: str) -> Callable[..., object]:
    """Work that begins now, not shown to profilers; call what is returned, once, when somebody has waited for it."""
    if not _is_on:
        return nothing
    number = _num_watches  # a flight that nobody ends must not keep its watcher alive
    if watcher is not None:
        watcher.begin(kind, name)
    end_recorded = _recorded_flight(recording, kind, name) if recording is not None else nothing

    def end() -> None:
        end_recorded()
        if watcher is not None and number == _num_watches:
            watcher.end(kind, name)

    return end


def _recorded_flight(recorded: ChromeTrace, kind: str, name: str) -> Callable[[], None]:
    begin, mark = time.monotonic_ns(), _streams.begin()
    number = recorded.begin_flight(kind)

    def end() -> None:
        track = recorded.end_flight(kind, number)
        _streams.end(mark, kind, name, flight=track)
        recorded.add(Span(recorded.own(track), kind, name, begin, time.monotonic_ns()))

    return end


def start(folder: str | os.PathLike[str]) -> None:
    """Record a Chrome trace from here on, `rank-00000.json` of rank 0; `ZEROLITE_TRACE` does it from the beginning."""
    global recording, _is_on
    recording, _is_on = ChromeTrace(Path(folder)), True


def write() -> None:
    """Have the file hold everything until now. At the interpreter's exit this happens by itself."""
    if recording is not None:
        recording.write()


def stop() -> None:
    """Write, and record no more."""
    global recording, _is_on
    if recording is not None:
        recording.close()
    recording, _is_on = None, watcher is not None


def watch(told: Watcher | None) -> None:
    """Tell `told` of everything from here on, and nobody else; None: nobody."""
    global watcher, _num_watches, _is_on
    _num_watches += 1
    watcher, _is_on = told, told is not None or recording is not None


if os.environ.get("ZEROLITE_TRACE"):
    start(os.environ["ZEROLITE_TRACE"])
