"""Things that happen late: what a GPU, its streams and a busy machine do to the order of events, on the CPU, by lot.

`slow_workers` has every command of the optimizer processes wait. 
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def slow_workers(seconds: float, seed: int = 0, is_fixed: bool = False) -> Iterator[None]:
    """Workers started inside sleep up to `seconds` before each command, or just that long."""
    from zerolite_kernels import cpu_worker

    script = cpu_worker.__file__
    kernels = str(Path(script).resolve().parents[1])
    settings = {"kernels": kernels, "seconds": seconds, "seed": seed, "is_fixed": is_fixed}
    os.environ["DELAYS"] = json.dumps(settings)
    cpu_worker.__file__ = str(Path(__file__).with_name("slow_worker.py"))
    try:
        yield
    finally:
        cpu_worker.__file__ = script
        del os.environ["DELAYS"]
