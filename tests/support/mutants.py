"""Code that is broken on purpose, for as long as a test needs to see that it would notice."""

from __future__ import annotations

import contextlib
import inspect
import textwrap
from collections.abc import Iterator


@contextlib.contextmanager
def replaced(owner, name: str, value) -> Iterator[None]:
    own = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before) if own else delattr(owner, name)


@contextlib.contextmanager
def mutated(owner: type, name: str, old: str, new: str) -> Iterator[None]:
    """A method whose source has `new` for `old`, once; AssertionError where it does not read so any more."""
    function = vars(owner)[name]
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{owner.__name__}.{name} has {source.count(old)} times {old!r}: renew this mutant"
    found: dict = {}
    exec("from __future__ import annotations\n" + source.replace(old, new), function.__globals__, found)
    with replaced(owner, name, found[name]):
        yield
