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
TICK_SECONDS = 0.1  # between two looks of the listener
TICKS_A_LOOK = 10  # at long waits
GRACE_SECONDS = 0.3  # between the end of another rank's connection and the arrival of its message
UNUSED_TAG = 2**31 - 1  # of gloo's messages
ANSWER_SECONDS = 0.7  # for the other ranks' words

# Whose failures these are. Weak: whoever keeps a process group that was destroyed keeps its connections open.
_world: Callable[[], dist.ProcessGroup | None] = lambda: None
_listener: threading.Thread | None = None
_failures: list[str] = []


def listen() -> None:
    """Listen for failures of the present world; without torch.distributed there is no other rank that could fail."""
    global _world, _listener, _failures
    if not dist.is_initialized() or dist.get_world_size() == 1 or dist.group.WORLD is _world():
        return
    _world, _failures = weakref.ref(dist.group.WORLD), []
    clone = distributed_c10d._get_default_store().clone()  # a connection of its own
    _listener = threading.Thread(
        target=_listen, args=(clone, _world, dist.get_rank(), _failures), name="zerolite-abort", daemon=True
    )
    _listener.start()


def publish(message: str) -> None:
    """Send a worker's failure to every rank that listens."""
    if _listener is not None:
        _failures.append(message)
        with contextlib.suppress(RuntimeError):  # the store is gone, and with it the run
            distributed_c10d._get_default_store().set(KEY, json.dumps(["worker", message]))


def has_failed() -> bool:
    """Whether a failure was published: nothing that communicates can end well."""
    return bool(_failures)


def failure_of(what: str, advice: str) -> ZeroliteError:
    """The error for a collective that has failed on this rank, and on every other: they hear of it.

    A failure that was published before, by a worker or by another rank, is the cause. It waits for it, since a broken
    connection can arrive first, and for the other ranks to tell where they are: together about a second.
    """
    message = f"rank {dist.get_rank()}: {what}"
    with contextlib.suppress(RuntimeError, ValueError):  # the store is gone, and with it the run
        store = distributed_c10d._get_default_store()
        if _listener is None or not (_listener.is_alive() or _failures):
            return ZeroliteError(f"{message}. {advice}")
        _until(lambda: bool(_failures) or store.check([KEY]), GRACE_SECONDS)
        kind, first = json.loads(store.compare_set(KEY, "", json.dumps(["collective", message])))
        if kind == "worker":
            return WorkerError(first)
        words = _words(store)
        cause = "" if first == message else f"; {first}"
        return ZeroliteError(f"{message}{cause}. {'; '.join(words)}. {advice}")
    return ZeroliteError(f"{message}. {advice}")


def _words(store) -> list[str]:
    """What every rank was doing when it heard of a failure; those that are gone or stopped say nothing."""
    keys = [f"{KEY}/{rank}" for rank in range(dist.get_world_size())]
    _until(lambda: store.check(keys), ANSWER_SECONDS)
    return in_words([store.get(key).decode() if store.check([key]) else None for key in keys])


def _until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)


def _listen(store, world: Callable[[], dist.ProcessGroup | None], rank: int, failures: list[str]) -> None:
    """Until a failure is published, or the process group has gone."""

    def is_over() -> bool:
        return dist.group.WORLD is None or dist.group.WORLD is not world()

    waits, ticks = LongWaits(store, rank, dist.get_world_size()), 0
    with contextlib.suppress(RuntimeError):
        while not store.check([KEY]):
            if is_over():
                return
            ticks += 1
            if ticks % TICKS_A_LOOK == 0:
                waits.look()
            time.sleep(TICK_SECONDS)
        _, message = json.loads(store.get(KEY))
        word = whereabouts()
        failures.append(message)
        store.set(f"{KEY}/{rank}", word)
        _words(store)  # the end of this rank's connections would move the others on
        if is_over():
            return
        if word.startswith("in no call"):
            warnings.warn(f"zerolite ends the process groups of rank {rank}: {message}", stacklevel=1)
        _end_collectives()


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
