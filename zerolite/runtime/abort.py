"""Failure broadcast: the first rank that fails ends the collectives of all others, with its message.

The failing rank publishes its message in the process group's store, outside of collectives. A listener thread of each
rank sleeps on that key. It aborts the process groups, so that a collective in flight fails, and `collectives` raises
the published message instead of the transport's.
"""

import contextlib
import datetime
import threading
import time

import torch.distributed as dist
from torch.distributed import distributed_c10d

from zerolite.errors import WorkerError

KEY = "zerolite/abort"  # and the number of this world: torchrun's store outlives the ranks that it starts again
FOREVER = datetime.timedelta(days=365)
GRACE_SECONDS = 0.7  # between the end of another rank's connection and the arrival of its message

_world: dist.ProcessGroup | None = None  # whose failures these are
_key = KEY
_listener: threading.Thread | None = None
_failures: list[str] = []


def listen(number: float) -> None:
    """Listen for failures of the present world; without torch.distributed there is no other rank that could fail.

    number: one that all ranks have, and that no world before had which used the same store.
    """
    global _world, _key, _listener, _failures
    if not dist.is_initialized() or dist.get_world_size() == 1 or dist.group.WORLD is _world:
        return
    _world, _key, _failures = dist.group.WORLD, f"{KEY}/{number.hex()}", []
    clone = distributed_c10d._get_default_store().clone()  # a connection of its own
    _listener = threading.Thread(target=_sleep, args=(clone, _key, _failures), name="zerolite-abort", daemon=True)
    _listener.start()


def publish(message: str) -> None:
    """Send a failure to every rank that listens."""
    if _listener is not None:
        _failures.append(message)
        with contextlib.suppress(RuntimeError):  # the store is gone, and with it the run
            distributed_c10d._get_default_store().set(_key, message)


def check() -> None:
    """WorkerError where a failure was published: what an aborted collective has left on the device is no result.

    NCCL's collectives only order streams. The host that reads what one wrote returns from its read when the group is
    aborted, with whatever lies there; so every such read is followed by this.
    """
    if _failures:
        raise WorkerError(_failures[0])


def received() -> str | None:
    """The failure that was published, if any; waits GRACE_SECONDS, since a broken connection can arrive first."""
    deadline = time.monotonic() + GRACE_SECONDS
    while _listener is not None and not _failures and _listener.is_alive() and time.monotonic() < deadline:
        _listener.join(timeout=0.05)
    return _failures[0] if _failures else None


def _sleep(store, key: str, failures: list[str]) -> None:
    with contextlib.suppress(RuntimeError):
        store.wait([key], FOREVER)
        failures.append(store.get(key).decode())
        with contextlib.suppress(RuntimeError, AttributeError):
            distributed_c10d._abort_process_group()
