"""One rank's fatal news, heard on every rank: what would else wait for a collective ends with the reason.

The news travels by the process group's store, outside of collectives. A thread of each rank sleeps there; when it wakes
it aborts the process groups, so that a collective in flight fails, and `collectives` tells the news instead of that.
"""

import contextlib
import datetime
import threading
import time

import torch.distributed as dist
from torch.distributed import distributed_c10d

KEY = "zerolite/alarm"
FOREVER = datetime.timedelta(days=365)
GRACE_SECONDS = 3.0  # between another rank's end and its news

_listener: threading.Thread | None = None
_news: list[str] = []


def listen() -> None:
    """Have this process hear the news from now on. Idempotent; without torch.distributed there is nobody to hear."""
    global _listener
    if _listener is None and dist.is_initialized() and dist.get_world_size() > 1:
        store = distributed_c10d._get_default_store()
        _listener = threading.Thread(target=_sleep, args=(store.clone(),), name="zerolite-alarm", daemon=True)
        _listener.start()


def ring(message: str) -> None:
    """Tell every rank that listens."""
    _news.append(message)
    if _listener is not None:
        with contextlib.suppress(RuntimeError):  # the store is gone, and with it the run
            distributed_c10d._get_default_store().set(KEY, message)


def heard() -> str | None:
    """The news, if there is any; waits a moment for it, since a broken connection can be faster."""
    deadline = time.monotonic() + (GRACE_SECONDS if _listener is not None else 0.0)
    while not _news and time.monotonic() < deadline and _listener.is_alive():
        _listener.join(timeout=0.05)
    return _news[0] if _news else None


def _sleep(store) -> None:
    with contextlib.suppress(RuntimeError):
        store.wait([KEY], FOREVER)
        _news.append(store.get(KEY).decode())
        with contextlib.suppress(RuntimeError, AttributeError):
            distributed_c10d._abort_process_group()
