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

_world: dist.ProcessGroup | None = None  # whose news these are
_listener: threading.Thread | None = None
_news: list[str] = []


def listen() -> None:
    """Have this process hear the news of its world from now on; without torch.distributed there is nobody to hear."""
    global _world, _listener, _news
    if not dist.is_initialized() or dist.get_world_size() == 1 or dist.group.WORLD is _world:
        return
    _world, _news = dist.group.WORLD, []
    store = distributed_c10d._get_default_store()
    _listener = threading.Thread(target=_sleep, args=(store.clone(), _news), name="zerolite-alarm", daemon=True)
    _listener.start()


def ring(message: str) -> None:
    """Tell every rank that listens."""
    if _listener is not None:
        _news.append(message)
        with contextlib.suppress(RuntimeError):  # the store is gone, and with it the run
            distributed_c10d._get_default_store().set(KEY, message)


def heard() -> str | None:
    """The news, if there is any; waits a moment for it, since a broken connection can be faster."""
    deadline = time.monotonic() + GRACE_SECONDS
    while _listener is not None and not _news and _listener.is_alive() and time.monotonic() < deadline:
        _listener.join(timeout=0.05)
    return _news[0] if _news else None


def _sleep(store, news: list[str]) -> None:
    with contextlib.suppress(RuntimeError):
        store.wait([KEY], FOREVER)
        news.append(store.get(KEY).decode())
        with contextlib.suppress(RuntimeError, AttributeError):
            distributed_c10d._abort_process_group()
