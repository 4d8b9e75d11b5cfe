"""Failure broadcast: what ends one rank is told to all others, who end with its reason instead of the transport's.

The rank that fails publishes its reason in the process group's store, outside of collectives: an optimizer worker that
failed, or (`announce`) any exception that nobody catches. The first one counts. gloo's collectives fail on the other
ranks when its process ends, and `collectives` reads the reason then. NCCL's would wait, so there, and where workers
step, a listener thread of each rank sleeps on the reason and aborts the process groups. A rank whose program ends well
says so when it does, and nothing is aborted.
"""

import atexit
import contextlib
import datetime
import os
import sys
import threading
import time
import traceback
import weakref
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed import distributed_c10d

from zerolite.errors import WorkerError, ZeroliteError

KEY = "zerolite/abort"  # /rank: what that rank is to hear
OVER = "-"  # nothing more: its listener may end
HEARD = "zerolite/heard"  # how many ranks have read the reason
ENDED = "zerolite/ended"  # /rank: its program has come to its end
FOREVER = datetime.timedelta(days=365)
GRACE_SECONDS = 0.7  # between the end of another rank's connection and the arrival of its message
MAX_CHARACTERS = 2000
BROKEN_MARKS = ("onnection", "NCCL", "process group has not been initialized")  # of torch's errors about another rank
KINDS = {kind.__name__: kind for kind in (WorkerError, ZeroliteError)}


class Failure(NamedTuple):
    """What ended a rank."""

    kind: type[ZeroliteError]
    message: str  # names the rank
    is_own: bool = False  # this rank's


class World(NamedTuple):
    """What the end of this process is told to."""

    group: weakref.ref  # the world's group, whose connections must close where the program destroys it
    store: dist.Store  # kept, since the program may destroy the group before it ends
    rank: int
    size: int
    failures: list[Failure]  # heard or published


_world: World | None = None
_listener: threading.Thread | None = None
_listens_to: World | None = None
_abort_lock = threading.Lock()
_previous_hook = sys.excepthook
_process = os.getpid()  # not a data loader that was forked from it


def announce() -> None:
    """Have other ranks of the present world told of what ends this process."""
    global _world, _previous_hook, _process
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    group = dist.group.WORLD
    if _world is not None and _world.group() is group:
        return
    if _world is None:
        _process, _previous_hook = os.getpid(), sys.excepthook
        sys.excepthook = _publish_uncaught
        atexit.register(_publish_end)
    store = distributed_c10d._get_default_store()
    _world = World(weakref.ref(group), store, dist.get_rank(), dist.get_world_size(), [])


def listen() -> None:
    """Announce, and listen for failures of the present world; without others there is no rank that could fail."""
    global _listens_to, _listener
    announce()
    if not dist.is_initialized() or dist.get_world_size() == 1 or _world is None or _world is _listens_to:
        return
    _end_listener()
    _listens_to = _world
    clone = _world.store.clone()  # a connection of its own
    _listener = threading.Thread(target=_sleep, args=(clone, _world), name="zerolite-abort", daemon=True)
    _listener.start()


def publish(message: str, kind: type[ZeroliteError] = WorkerError) -> None:
    """Send a failure to every rank, unless one has been heard; `kind` is the error that they raise."""
    if _world is None or _world.failures:
        return
    _world.failures.append(Failure(kind, message, is_own=True))
    _send_others(_world, f"{kind.__name__} {message}"[:MAX_CHARACTERS])


def rank() -> int:
    """This process in the announced world."""
    return _world.rank if _world is not None else 0


def has_heard() -> bool:
    return _world is not None and bool(_world.failures)


def check() -> None:
    """The error that was published, if any: what an aborted collective has left on the device is no result.

    NCCL's collectives only order streams. The host that reads what one wrote returns from its read when the group is
    aborted, with whatever lies there; so every such read is followed by this.
    """
    if _world is not None and _world.failures:
        raise _world.failures[0].kind(_world.failures[0].message)


def reason(peer: int | None = None) -> Failure | None:
    """The failure that was published, if any, for a collective that did not complete; `peer`: the rank that is gone.

    Waits GRACE_SECONDS, since a broken connection can arrive before the word that explains it.
    """
    if _world is None:
        return None
    deadline = time.monotonic() + GRACE_SECONDS
    while not _world.failures and time.monotonic() < deadline and not (peer is not None and has_ended(peer)):
        if _world is _listens_to and _listener is not None and _listener.is_alive():
            _listener.join(timeout=0.05)
        elif _read(_world.store, _world):
            time.sleep(0.02)
        else:
            break
    return _world.failures[0] if _world.failures else None


def has_ended(rank: int) -> bool:
    """Whether another rank's program came to its end, or left it by `sys.exit`."""
    with contextlib.suppress(RuntimeError):
        return _world is not None and _world.store.check([f"{ENDED}/{rank}"])
    return False


def _send_others(world: World, text: str) -> None:
    """Have the other ranks hear `text`, unless they have been sent something before."""
    with contextlib.suppress(RuntimeError):  # the store is gone, and with it the run
        for rank in set(range(world.size)) - {world.rank}:
            world.store.compare_set(f"{KEY}/{rank}", "", text)


def _wait_until_heard(world: World) -> None:
    """Before rank 0 ends: it may be the one that has the store."""
    deadline = time.monotonic() + GRACE_SECONDS
    with contextlib.suppress(RuntimeError):
        while world.store.add(HEARD, 0) < world.size - 1 and time.monotonic() < deadline:
            time.sleep(0.01)


def _read(store: dist.Store, world: World) -> bool:
    """Read what this rank is to hear, if anything; False where nothing will come any more."""
    with contextlib.suppress(RuntimeError):
        key = f"{KEY}/{world.rank}"
        if not store.check([key]):
            return True
        kind, _, message = store.get(key).decode(errors="replace").partition(" ")
        store.add(HEARD, 1)
        if kind != OVER and not world.failures:
            world.failures.append(Failure(KINDS[kind], message))
    return False


def _sleep(store: dist.Store, world: World) -> None:
    with contextlib.suppress(RuntimeError):
        store.wait([f"{KEY}/{world.rank}"], FOREVER)
        _read(store, world)
        if world is _world and world.failures and not world.failures[0].is_own:
            _abort_groups()


def _end_listener() -> None:
    """A thread that sleeps in the store when the interpreter ends would end the process by SIGABRT."""
    if _listens_to is not None and _listener is not None and _listener.is_alive():
        with contextlib.suppress(RuntimeError):
            _listens_to.store.compare_set(f"{KEY}/{_listens_to.rank}", "", OVER)
        _listener.join(timeout=1.0)


def _abort_groups() -> None:
    """End this rank's collectives: NCCL's at once, gloo's with its process."""
    with _abort_lock, contextlib.suppress(RuntimeError, AttributeError, AssertionError, ValueError):  # none are left
        distributed_c10d._abort_process_group()


def _publish_uncaught(kind, error, trace) -> None:
    """`sys.excepthook`: the traceback first, then the word to other ranks, whose time to read it is bounded.

    Where the error is that of a plain torch collective, whose other rank has failed, its reason is said instead.
    """
    _previous_hook(kind, error, trace)
    if os.getpid() != _process or _world is None:
        return
    if not isinstance(error, ZeroliteError) and any(mark in str(error) for mark in BROKEN_MARKS):
        cause = reason()
        if cause is not None and cause.message not in str(error):
            print(f"rank {_world.rank} ends because of another: {cause.message}", file=sys.stderr)
    said = "".join(traceback.format_exception_only(kind, error)).strip()
    publish(f"rank {_world.rank} failed: {said}", ZeroliteError)
    _abort_groups()
    if _world.rank == 0 and _world.failures[0].is_own:
        _wait_until_heard(_world)


def _publish_end() -> None:
    """At the interpreter's exit. Rank 0, which may be the one that has the store, ends all listeners with it."""
    if os.getpid() != _process or _world is None:
        return
    if not _world.failures:
        with contextlib.suppress(RuntimeError):
            _world.store.set(f"{ENDED}/{_world.rank}", "")
        if _world.rank == 0 and _listens_to is _world:
            _send_others(_world, OVER)
            _wait_until_heard(_world)
    _end_listener()
