"""What this process is doing, in words: its call of zerolite and the user's line, for errors that all ranks get.

Nothing is recorded for it. Whoever asks looks at the Python frames of all threads, so a step costs nothing more.
"""

import linecache
import sys
import sysconfig
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

MAX_SOURCE = 80  # characters of a user's line
# Zerolite's own threads, and pools, begin here; a thread that a user trains in has a function of the user's below.
THREAD_MODULES = ("threading", "concurrent.futures.thread")
# A frame of torch's that is running a backward, in this thread; autograd's threads for GPUs have none of the user's.
BACKWARD = "_engine_run_backward"


def whereabouts() -> str:
    """This process's call of zerolite, with the unit where it is one of the walk, and the user's line that made it."""
    frames = sys._current_frames()
    main = frames.pop(threading.main_thread().ident or 0, None)
    frames.pop(threading.get_ident(), None) if main is not None else None
    stacks = [list(_outward(frame)) for frame in ([main] if main is not None else []) + list(frames.values())]
    for stack in stacks:
        entry = _entry(stack)
        if entry is not None:
            call = _call(stack[entry], stack[entry + 1 :])
            line = _user_line(stack[entry + 1 :]) or (_user_line(stacks[0]) if main is not None else None)
            return f"in {call}, {line}" if line else f"in {call}"
    line = _user_line(stacks[0]) if main is not None else None
    return f"in no call of zerolite, {line}" if line else "in no call of zerolite"


def _outward(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _entry(stack: list[FrameType]) -> int | None:
    """Where in a stack its outermost call of zerolite is; None where there is none, or the thread is zerolite's own."""
    entries = [index for index, frame in enumerate(stack) if _is_zerolite(frame)]
    if not entries or (entries[-1] + 1 < len(stack) and _module(stack[entries[-1] + 1]) in THREAD_MODULES):
        return None
    return entries[-1]


def _call(frame: FrameType, outer: list[FrameType]) -> str:
    owner, name = frame.f_locals.get("self"), frame.f_code.co_name
    unit = getattr(owner, "unit", None)
    if not outer or any(one.f_code.co_name == BACKWARD for one in outer):
        return f"the backward of {unit.name}" if unit is not None else "a backward"
    if unit is not None:
        return f"a read of a parameter of {unit.name}" if name == "__getitem__" else f"the forward of {unit.name}"
    if name == "__torch_dispatch__":
        return "an operation on a parameter's .grad"
    return f"{type(owner).__name__}.{name}" if owner is not None else f"zerolite's {name}"


def _user_line(stack: list[FrameType]) -> str | None:
    """The innermost line of a stack that is neither a library's nor zerolite's: "at train.py:40: loss.backward()"."""
    for frame in stack:
        name = frame.f_code.co_filename
        if not (_is_zerolite(frame) or _is_library(name)):
            source = linecache.getline(name, frame.f_lineno).strip()
            line = f"at {Path(name).name}:{frame.f_lineno}"
            return f"{line}: {source[:MAX_SOURCE]}" if source else line
    return None


def _is_library(name: str) -> bool:
    in_packages = any(part in name for part in ("/site-packages/", "/dist-packages/"))
    return in_packages or name.startswith(("<frozen", sysconfig.get_path("stdlib")))


def _is_zerolite(frame: FrameType) -> bool:
    name = _module(frame)
    return (name == "zerolite" or name.startswith("zerolite.")) and not name.startswith("zerolite.medqa")


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))
