"""One rank's spans as a Chrome trace, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

Times are nanoseconds of CLOCK_MONOTONIC, which all processes of a machine share, so that trainer and workers lie on one
axis, and so do ranks of one machine. A track is a row of the picture: a thread, or work in flight that no thread does.
"""

import atexit
import json
import os
import threading
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple, Protocol
from weakref import WeakSet

import torch.distributed as dist

MAX_SPANS = 1_000_000  # the newest ones; a step of a 32-layer model has about 500
WRITE_SECONDS = 1.0  # between two writes of a run that goes on
WRITE_SHARE = 0.02  # of the time that a run may spend in writing
FIRST_OWN_TRACK = 1 << 23  # above every thread's number (pid_max is at most 1 << 22)


class Track(NamedTuple):
    """A row: the numbers of a process and a thread, the latter made up where there is no thread."""

    process: int
    thread: int


class Span(NamedTuple):
    track: Track
    kind: str
    name: str  # of the unit, or of what is worked on
    begin: int  # ns
    end: int  # ns
    nbytes: int = 0  # that were copied


class Source(Protocol):
    """Who has spans of its own: it is asked before each write."""

    def collect(self, recording: "ChromeTrace") -> None: ...


sources: WeakSet[Source] = WeakSet()


class ChromeTrace:
    """The file `rank-00000.json` of a folder: complete JSON at any time, each time replaced as a whole.

    It is written when somebody asks, at the interpreter's exit, and about once a second in between, so that little is
    missing after `os._exit` or SIGKILL.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.rank = 0  # in the world, known once torch.distributed runs
        self.spans: deque[Span] = deque(maxlen=MAX_SPANS)
        self._process = os.getpid()
        self._names: dict[Track, tuple[str, str]] = {}  # (process, thread)
        self._flying: dict[str, list[bool]] = {}  # kind -> which of its tracks are in use
        self._own: dict[str, int] = {}  # name of a track that is no thread's -> its number
        self._lock = threading.Lock()
        self._next_write = time.monotonic_ns() + int(WRITE_SECONDS * 1e9)
        atexit.register(self.write)

    def add(self, span: Span) -> None:
        if not self.spans:
            self.rank = _rank()
        self.spans.append(span)
        if span.end > self._next_write:
            self.write()

    def this_thread(self) -> Track:
        track = Track(self._process, threading.get_native_id())
        if track not in self._names:
            self._names[track] = ("", threading.current_thread().name)
        return track

    def thread(self, process: int, process_name: str, number: int) -> Track:
        """The track of a thread of another process."""
        track = Track(process, FIRST_OWN_TRACK + number)
        self._names[track] = (process_name, f"thread {number}")
        return track

    def begin_flight(self, kind: str) -> int:
        """The first free one of the kind's tracks: on one track spans may nest and not cross."""
        with self._lock:
            tracks = self._flying.setdefault(kind, [])
            if all(tracks):
                tracks.append(False)
            number = tracks.index(False)
            tracks[number] = True
            return number

    def end_flight(self, kind: str, number: int) -> str:
        """The name of the flight's track, which is free again."""
        with self._lock:
            self._flying[kind][number] = False
        return f"{kind} in flight" + (f" ({number + 1})" if number else "")

    def own(self, name: str) -> Track:
        """A track of this process that is no thread's."""
        with self._lock:
            number = self._own.setdefault(name, len(self._own))
        track = Track(self._process, FIRST_OWN_TRACK + number)
        self._names[track] = ("", name)
        return track

    def close(self) -> None:
        """Write for the last time."""
        self.write()
        atexit.unregister(self.write)

    def write(self) -> None:
        """Replace the file by one with all spans so far."""
        if os.getpid() != self._process:
            return  # a fork of the trainer (a data loader)
        for source in list(sources):
            source.collect(self)
        with self._lock:
            begin = time.monotonic_ns()
            events = [*self._metadata(), *map(_event, list(self.spans))]
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"rank-{self.rank:05d}.json"
            unfinished = path.with_suffix(".unfinished")
            unfinished.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
            unfinished.replace(path)
            end = time.monotonic_ns()
            self._next_write = end + max(int(WRITE_SECONDS * 1e9), int((end - begin) / WRITE_SHARE))

    def _metadata(self) -> list[dict]:
        """The names of processes and tracks."""
        events = []
        for track, (process_name, thread_name) in list(self._names.items()):
            whole_name = f"rank {self.rank} {process_name}".rstrip()
            for what, name in (("process_name", whole_name), ("thread_name", thread_name)):
                events.append(
                    {"ph": "M", "name": what, "pid": track.process, "tid": track.thread, "args": {"name": name}}
                )
        return events


def _event(span: Span) -> dict:
    return {
        "ph": "X",
        "name": f"{span.kind} ({span.name})",
        "cat": span.kind,
        "pid": span.track.process,
        "tid": span.track.thread,
        "ts": span.begin / 1000,
        "dur": (span.end - span.begin) / 1000,
        "args": {"name": span.name} | ({"bytes": span.nbytes} if span.nbytes else {}),
    }


def _rank() -> int:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0"))
