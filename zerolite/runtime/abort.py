"""Failure broadcast: the first rank that fails ends the collectives of all others, with its message.

The failing rank publishes its message in the process group's store, outside of collectives. A listener thread of each
rank looks at that key. It leaves word of what its rank is doing, and aborts the process groups, so that a collective in
flight fails, and `collectives` raises what was published and what every rank was doing instead of the transport's word.

The same thread warns of long waits without a failure: long_waits.py.
"""

import contextlib
import datetime
import json
import threading
import time
import warnings
import weakref
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from zerolite.errors import WorkerError, ZeroliteError
from zerolite.runtime.long_waits import LongWaits, in_words
from zerolite.runtime.whereabouts import whereabouts

KEY = "zerolite/abort"
WORKER, COLLECTIVE = "worker", "collective"  # what has failed
TICK_SECONDS = 0.1  # between two looks of the listener
TICKS_A_LOOK = 10  # at long waits
GRACE_SECONDS = 0.3  # between the end of another rank's connection and the arrival of its message
UNUSED_TAG = 2**31 - 1  # of gloo's messages
ANSWER_SECONDS = 0.7  # for the other ranks' words


class _Listener(threading.Thread):
    """Listens for failures of one world, until one is published or the process group has gone."""

    def __init__(self):
        super().__init__(name="zerolite-abort", daemon=True)
        # Weak: whoever keeps a process group that was destroyed keeps its connections open.
        self.world = weakref.ref(dist.group.WORLD)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.store = distributed_c10d._get_default_store().clone()  # a connection of its own
        self.failures: list[str] = []

    def run(self) -> None:
        waits, ticks = LongWaits(self.store, self.rank, self.world_size), 0
        with contextlib.suppress(RuntimeError):  # the store is gone, and with it the run
            while not self.store.check([KEY]):
                if self.is_over():
                    return
                ticks += 1
                if ticks % TICKS_A_LOOK == 0:
                    waits.look()
                time.sleep(TICK_SECONDS)
            self._end()

    def is_over(self) -> bool:
        return dist.group.WORLD is None or dist.group.WORLD is not self.world()

    def _end(self) -> None:
        _, message = json.loads(self.store.get(KEY))
        word = whereabouts()
        self.failures.append(message)
        self.store.set(f"{KEY}/{self.rank}", word)
        self.words()  # the end of this rank's connections would move the others on
        if not self.is_over():
            if word.startswith("in no call"):
                warnings.warn(f"zerolite ends the process groups of rank {self.rank}: {message}", stacklevel=1)
            _end_collectives()

    def words(self) -> list[str]:
        """What every rank was doing when it heard of a failure; those that are gone or stopped say nothing."""
        keys = [f"{KEY}/{rank}" for rank in range(self.world_size)]
        _until(lambda: self.store.check(keys), ANSWER_SECONDS)
        return in_words([self.store.get(key).decode() if self.store.check([key]) else None for key in keys])

    def publish(self, kind: str, message: str) -> tuple[str, str]:
        """Make it known, unless another failure was; the kind and message of the one that was first."""
        return json.loads(self.store.compare_set(KEY, "", json.dumps([kind, message])))


_listener: _Listener | None = None  # of the present world, or the last one


def listen() -> None:
    """Listen for failures of the present world; without torch.distributed there is no other rank that could fail."""
    global _listener
    if not dist.is_initialized() or dist.get_world_size() == 1:
        _listener = None
    elif _listener is None or _listener.is_over():
        _listener = _Listener()
        _listener.start()


def publish(message: str) -> None:
    """Send a worker's failure to every rank that listens."""
    if _listener is not None:
        _listener.failures.append(message)
        with contextlib.suppress(RuntimeError):
            _listener.publish(WORKER, message)


def has_failed() -> bool:
    """Whether a failure was published: nothing that communicates can end well."""
    return _listener is not None and bool(_listener.failures)


def failure_of(what: str, advice: str) -> ZeroliteError:
    """The error for a collective that has failed on this rank, and on every other: they hear of it.

    A failure that was published before, by a worker or by another rank, is the cause. It waits for it, since a broken
    connection can arrive first, and for the other ranks to tell where they are: together about a second.
    """
    listener = _listener
    if listener is None or not (listener.is_alive() or listener.failures):
        return ZeroliteError(f"rank {dist.get_rank()}: {what}. {advice}")
    message = f"rank {listener.rank}: {what}"
    with contextlib.suppress(RuntimeError):
        _until(lambda: bool(listener.failures) or listener.store.check([KEY]), GRACE_SECONDS)
        kind, first = listener.publish(COLLECTIVE, message)
        if kind == WORKER:
            return WorkerError(first)
        words = listener.words()
        cause = "" if first == message else f"; {first}"
        return ZeroliteError(f"{message}{cause}. {'; '.join(words)}. {advice}")
    return ZeroliteError(f"{message}. {advice}")


def _until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)


def _end_collectives() -> None:
    """Have every collective of this process fail, in flight or to come, whoever called it."""
    for group in list(distributed_c10d._world.pg_map):
        if group.size() > 1:
            # gloo has no abort; a receive that times out closes its group's connections, here and at the other ends.
            with contextlib.suppress(RuntimeError):
                work = group.recv([torch.zeros(1)], (group.rank() + 1) % group.size(), UNUSED_TAG)
                work.wait(datetime.timedelta(milliseconds=1))
    with contextlib.suppress(RuntimeError, AttributeError):
        distributed_c10d._abort_process_group()
