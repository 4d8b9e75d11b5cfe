"""placeholder until h/trace is merged"""

import contextlib

_NULL = contextlib.nullcontext()


def phase(kind: str, name: str):
    return _NULL
