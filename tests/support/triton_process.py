"""Processes that compile Triton's kernels or interpret them, which is decided before triton is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch


def process(interpret: str, prepare: Callable[[], None] | None = None) -> Iterator[Callable]:
    """For a fixture: yields what calls a function of a module in a process with TRITON_INTERPRET=`interpret`."""
    with ProcessPoolExecutor(1, get_context("spawn"), _begin, (interpret, prepare)) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()


def _begin(interpret: str, prepare: Callable[[], None] | None) -> None:
    assert "triton" not in sys.modules
    os.environ["TRITON_INTERPRET"] = interpret
    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
