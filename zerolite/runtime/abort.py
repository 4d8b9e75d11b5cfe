"""Failure broadcast: what ends one rank is told to all others, who end with its reason instead of the transport's.

The rank that fails publishes its reason in the process group's store, outside of collectives: an optimizer worker that
failed, a collective that failed, or an exception that nobody catches. The first one counts. A listener thread of each
rank looks there. It leaves word of what its rank is doing, and ends the process groups, so that a collective in flight
fails; failures.py says then what was published and what every rank was doing. A rank whose program ends well says so,
and nothing is ended.

The same thread warns of long waits without a failure: long_waits.py.
"""

import atexit
import contextlib
import datetime
import json
import os
import sys
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from zerolite.errors import ZeroliteError
from zerolite.runtime.long_waits import LongWaits, in_words
from zerolite.runtime.whereabouts import whereabouts

# Names in the store, behind a number of this world's own: a store may outlive the ranks that torchrun starts again.
FAILURE = "failure"  # the first one
WORD = "word"  # /rank: what it was doing when it heard
ENDED = "ended"  # /rank: its program has come to its end
STOPPED = "stopped"  # how many listeners have ended since rank 0's program has
WORKER, RANK, COLLECTIVE = "worker", "rank", "collective"  # what has failed
OVER = "over"  # nothing has, nor will be told: the rank that has the store ends
TICK_SECONDS = 0.1  # between two looks of the listener
TICKS_A_LOOK = 10  # at long waits
GRACE_SECONDS = 0.5  # between the end of another rank's connection and the arrival of its message
ANSWER_SECONDS = 0.7  # for the other ranks' words
MAX_CHARACTERS = 2000
UNUSED_TAG = 2**31 - 1  # of gloo's messages
BROKEN_MARKS = ("onnection", "NCCL", "timeout", "process group has not been initialized")  # of torch's errors


class Failure(NamedTuple):
    """What was published first."""

    kind: str
    message: str  # names the rank


class _Listener(threading.Thread):
    """Listens for failures of one world, until one is published or the process group has gone."""

    def __init__(self, number: float):
        super().__init__(name="zerolite-abort", daemon=True)
        # Weak: whoever keeps a process group that was destroyed keeps its connections open.
        self.world = weakref.ref(dist.group.WORLD)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        own = distributed_c10d._get_default_store()
        # The program may destroy its group, and its store, before it ends. The thread has a connection of its own.
        self.store, self.clone = (dist.PrefixStore(f"zerolite/{number.hex()}", one) for one in (own, own.clone()))
        self.failure: Failure | None = None
        self.is_stopped = threading.Event()

    def run(self) -> None:
        waits, ticks = LongWaits(self.clone, self.rank, self.world_size), 0
        with contextlib.suppress(RuntimeError):  # the store is gone, and with it the run
            while not self.clone.check([FAILURE]):
                if self.is_over() or self.is_stopped.wait(TICK_SECONDS):
                    return
                ticks += 1
                if ticks % TICKS_A_LOOK == 0:
                    waits.look()
            self._end()

    def is_over(self) -> bool:
        return dist.group.WORLD is None or dist.group.WORLD is not self.world()

    def _read(self, store: dist.Store) -> Failure | None:
        first = Failure(*json.loads(store.get(FAILURE))) if store.check([FAILURE]) else None
        return None if first is None or first.kind == OVER else first

    def _end(self) -> None:
        self.failure = self._read(self.clone)
        if self.failure is None:
            self.clone.add(STOPPED, 1)
            return
        word = whereabouts()
        self.clone.set(f"{WORD}/{self.rank}", word)
        self.words(self.clone)  # the end of this rank's connections would move the others on
        if not self.is_over() and not self.is_stopped.is_set():
            if word.startswith("in no call"):
                told = f"zerolite ends the process groups of rank {self.rank}: {self.failure.message}"
                warnings.warn(told, stacklevel=1)
            _end_collectives(self.world())

    def words(self, store: dist.Store | None = None) -> list[str]:
        """What every rank was doing when it heard of a failure; those that are gone or stopped say nothing."""
        store, keys = store or self.store, [f"{WORD}/{rank}" for rank in range(self.world_size)]
        _until(lambda: store.check(keys), ANSWER_SECONDS)
        return in_words([store.get(key).decode() if store.check([key]) else None for key in keys])

    def publish(self, kind: str, message: str) -> Failure:
        """Make it known, unless another failure was; the one that was first."""
        self.failure = own = Failure(kind, message[:MAX_CHARACTERS])
        with contextlib.suppress(RuntimeError):
            self.store.compare_set(FAILURE, "", json.dumps(own))
            self.failure = self._read(self.store) or own
        return self.failure

    def heard(self, until: Callable[[], bool] = lambda: False) -> Failure | None:
        """What was published, if anything; it may arrive up to GRACE_SECONDS from now, unless `until`."""
        with contextlib.suppress(RuntimeError):
            _until(lambda: self.failure is not None or self.store.check([FAILURE]) or until(), GRACE_SECONDS)
            self.failure = self.failure or self._read(self.store)
        return self.failure

    def has_ended(self, rank: int) -> bool:
        with contextlib.suppress(RuntimeError):
            return self.store.check([f"{ENDED}/{rank}"])
        return False

    def end_all(self) -> None:
        """End the listeners of the other ranks, which would lose the store; where torchrun has it they go on."""
        with contextlib.suppress(RuntimeError):
            self.store.set(f"{ENDED}/{self.rank}", "")
            if self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                self.store.compare_set(FAILURE, "", json.dumps([OVER, ""]))
                _until(lambda: self.store.add(STOPPED, 0) >= self.world_size, GRACE_SECONDS)

    def stop(self) -> None:
        """A thread that is in the store when the interpreter ends would end the process by SIGABRT."""
        self.is_stopped.set()
        if self.is_alive() and threading.current_thread() is not self:
            self.join(timeout=1.0)


_listener: _Listener | None = None  # of the present world, or the last one
_lock = threading.Lock()
_previous_hook = sys.excepthook
_process: int | None = None  # not a data loader that was forked from it


def listen(number: float) -> None:
    """Listen for failures of the present world, and tell it what ends this process.

    number: one that all ranks have, and that no world before had which used the same store.
    """
    global _listener, _previous_hook, _process
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    if listener() is not None:
        return
    if _process is None:
        _process, _previous_hook = os.getpid(), sys.excepthook
        sys.excepthook = _publish_uncaught
        atexit.register(_publish_end)
    if _listener is not None:
        _listener.stop()
    _listener = _Listener(number)
    _listener.start()


def publish(message: str) -> None:
    """Send a worker's failure to every rank."""
    own = listener()
    if own is not None and own.failure is None:
        own.publish(WORKER, message)


def listener() -> _Listener | None:
    """The present world's; the last one's where there is none, since a failure ends it."""
    present = dist.group.WORLD
    return None if _listener is None or (present is not None and present is not _listener.world()) else _listener


def has_failed() -> bool:
    """Whether a failure was published: nothing that communicates can end well.

    NCCL's collectives only order streams. The host that reads what one wrote returns from its read when the group is
    ended, with whatever lies there; so every such read asks this.
    """
    own = listener()
    return own is not None and own.failure is not None


def _until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)


def _end_collectives(world: dist.ProcessGroup | None) -> None:
    """Have every collective of `world` fail on this rank, in flight or to come, whoever called it.

    A program that hears of the failure may start another world at once: that one is left alone.
    """
    with _lock:
        for group in list(distributed_c10d._world.pg_map):
            if group.size() > 1 and world is not None and dist.group.WORLD is world:
                # gloo has no abort; a receive that times out closes its group's connections, here and at other ends.
                with contextlib.suppress(RuntimeError):
                    work = group.recv([torch.zeros(1)], (group.rank() + 1) % group.size(), UNUSED_TAG)
                    work.wait(datetime.timedelta(milliseconds=1))
        with contextlib.suppress(RuntimeError, AttributeError, AssertionError, ValueError):  # none are left
            if world is not None:
                distributed_c10d._abort_process_group(world)  # ValueError where it was destroyed meanwhile


def _publish_uncaught(kind, error, trace) -> None:
    """`sys.excepthook`: the traceback first, then the word to other ranks, whose time to read it is bounded.

    Where the error is that of a plain torch collective, whose other rank has failed, its reason is said instead.
    """
    _previous_hook(kind, error, trace)
    own = _listener
    if os.getpid() != _process or own is None:
        return
    if not isinstance(error, ZeroliteError) and any(mark in str(error) for mark in BROKEN_MARKS):
        cause = own.heard()
        if cause is not None and cause.message not in str(error):
            print(f"rank {own.rank} ends because of another: {cause.message}", file=sys.stderr)
    said = "".join(traceback.format_exception_only(kind, error)).strip()
    if own.failure is None:
        own.publish(RANK, f"rank {own.rank} failed: {said}")
    with contextlib.suppress(RuntimeError):
        own.words()  # rank 0 may be the one that has the store: the others are to hear before it ends
    _end_collectives(own.world())


def _publish_end() -> None:
    """At the interpreter's exit."""
    own = _listener
    if os.getpid() != _process or own is None:
        return
    if own.failure is None:
        own.end_all()
    own.stop()
