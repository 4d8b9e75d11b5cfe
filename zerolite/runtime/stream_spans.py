"""What a GPU's streams did when, for the trace: events recorded around phases, read once they have happened."""

import time
from collections import deque
from typing import Any, NamedTuple

from zerolite.runtime import device as devices
from zerolite.runtime.chrome_trace import ChromeTrace, Span, sources


class Mark(NamedTuple):
    """A moment of a stream."""

    stream: int
    event: Any  # timed


class StreamSpans:
    """Pairs of marks that nobody has read yet, in the order of their ends; none without a GPU."""

    def __init__(self) -> None:
        self._pending: deque[tuple[Mark, Mark, str, str, str, int]] = (
            deque()
        )  # (begin, end, thread, kind, name, nbytes)
        self._origin: tuple[Any, int] | None = None  # an event, and when it happened in ns
        sources.add(self)

    def begin(self) -> Mark | None:
        event = devices.timed_event()
        if event is None:
            return None
        if self._origin is None:
            event[1].synchronize()
            self._origin = (event[1], time.monotonic_ns())
        return Mark(*event)

    def end(self, begin: Mark | None, kind: str, name: str, nbytes: int = 0, flight: str = "") -> None:
        """`flight`: the name of its track, where its spans may cross what else the stream does."""
        end = devices.timed_event()
        if begin is not None and end is not None:
            thread = f"stream {begin.stream}" if not flight else f"stream, {flight}"
            self._pending.append((begin, Mark(*end), thread, kind, name, nbytes))

    def collect(self, recording: ChromeTrace) -> None:
        """Move what has happened to the trace."""
        while self._pending and self._origin is not None and self._pending[0][1].event.query():
            begin, end, thread, kind, name, nbytes = self._pending.popleft()
            origin, origin_ns = self._origin
            began, ended = (origin_ns + int(1e6 * origin.elapsed_time(mark.event)) for mark in (begin, end))
            recording.spans.append(Span(recording.own(thread), kind, name, began, ended, nbytes))
            self._origin = (end.event, ended)  # elapsed times are fp32: exact to microseconds for a minute
