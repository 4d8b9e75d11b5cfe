"""Time limits of a quiet machine, longer where it is busy: a full machine must not look like a broken engine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable


def load() -> float:
    """Processes that want a core, for each core: of now or of the last minute, what is more, and at least 1."""
    last_minute, _, _, running, *_ = open("/proc/loadavg").read().split()
    return max(1.0, float(last_minute) / os.cpu_count(), int(running.split("/")[0]) / os.cpu_count())


class Limit:
    """So many seconds of a quiet machine, from now on; each real one counts as 1 / load at the time it is looked at."""

    def __init__(self, seconds: float) -> None:
        self.left, self.seen = seconds, time.monotonic()

    def is_over(self) -> bool:
        """To be asked every second or so: what lies between two questions is taken to be as busy as its end."""
        now = time.monotonic()
        self.left -= (now - self.seen) / load()
        self.seen = now
        return self.left <= 0


def until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether `condition` came true in so many seconds of a quiet machine."""
    limit = Limit(seconds)
    while not condition():
        if limit.is_over():
            return False
        time.sleep(0.005)
    return True
