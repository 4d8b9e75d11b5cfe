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
from typing import Any

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

recording: ChromeTrace | None = None  # changed by `start` and `stop` alone
_streams = StreamSpans()


def phase(kind: str, name: str, nbytes: int = 0) -> AbstractContextManager[object]:
    """A context: what this thread does inside is of this kind, for the unit of this name; `nbytes` of a copy."""
    if recording is None and not profiler._is_profiler_enabled:
        return OFF
    return _phase(kind, name, nbytes)


@contextmanager
def _phase(kind: str, name: str, nbytes: int) -> Iterator[None]:
    label, recorded = f"zerolite::{kind} ({name})", recording
    profiled = profiler.record_function(label) if profiler._is_profiler_enabled else OFF
    with profiled, devices.nvtx_range(label):
        if recorded is None:
            yield
            return
        begin, mark = time.monotonic_ns(), _streams.begin()
        try:
            yield
        finally:
            _streams.end(mark, kind, name, nbytes)
            recorded.add(Span(recorded.this_thread(), kind, name, begin, time.monotonic_ns(), nbytes))


def flight(kind: str, name: str) -> Callable[..., object]:
    """Work that begins now, in the Chrome trace only; call what is returned, once, when somebody has waited for it."""
    if recording is None:
        return nothing
    recorded, begin, mark = recording, time.monotonic_ns(), _streams.begin()
    number = recorded.begin_flight(kind)

    def end() -> None:
        track = recorded.end_flight(kind, number)
        _streams.end(mark, kind, name, flight=track)
        recorded.add(Span(recorded.own(track), kind, name, begin, time.monotonic_ns()))

    return end


def start(folder: str | os.PathLike[str]) -> None:
    """Record a Chrome trace from here on, `rank-00000.json` of rank 0; `ZEROLITE_TRACE` does it from the beginning."""
    global recording
    recording = ChromeTrace(Path(folder))


def write() -> None:
    """Have the file hold everything until now. At the interpreter's exit this happens by itself."""
    if recording is not None:
        recording.write()


def stop() -> None:
    """Write, and record no more."""
    global recording
    if recording is not None:
        recording.close()
    recording = None


if os.environ.get("ZEROLITE_TRACE"):
    start(os.environ["ZEROLITE_TRACE"])
