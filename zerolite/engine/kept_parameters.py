"""Parameters that a custom autograd.Function keeps as attributes of its context: opened before its backward runs.

A Function may write `ctx.weight = weight.t()` where it could call `ctx.save_for_backward` (bitsandbytes does). No hook
on saved tensors sees that, see entries.py. The context is the node itself, so what it keeps is looked at when the node
is about to run: a call a custom Function, none for torch's own nodes.
"""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING

import torch
from torch.autograd.function import BackwardCFunction

from zerolite.engine.trees import tensors_of

if TYPE_CHECKING:
    from zerolite.engine.entries import Entries

_watched: weakref.WeakSet[Entries] = weakref.WeakSet()  # of every model that frees parameters


def watch(entries: Entries) -> None:
    """Have what Functions keep of these parameters be opened."""
    _watched.add(entries)
    _look_before_backward()


@functools.cache
def _look_before_backward() -> None:
    """For every Function of this process, from now on."""
    for name in ("apply", "apply_boxed"):
        own = getattr(BackwardCFunction, name, None)  # the second is of newer versions of torch
        if own is not None:
            setattr(BackwardCFunction, name, _looking(own))


def _looking(own):
    @functools.wraps(own)
    def apply(self, *args):
        for value in self.__dict__.values():
            if isinstance(value, torch.Tensor):
                _open(value)
            elif isinstance(value, list | tuple | dict):
                for tensor in tensors_of(value):
                    _open(tensor)
        return own(self, *args)

    return apply


def _open(tensor: torch.Tensor) -> None:
    for entries in _watched:
        entries.open_kept(tensor)
