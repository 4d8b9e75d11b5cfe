"""Triton launches on the GPU that holds the tensors, whichever is current."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def on_its_device(function: Callable[P, R]) -> Callable[P, R]:
    """Run with the device of the first argument, a tensor, as the current one: Triton launches into its context."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device_of(args[0]):  # nothing where the tensor is on no GPU
            return function(*args, **kwargs)

    return run
