"""zerolite: ZeRO memory engineering for people who train large models on few GPUs."""

from importlib import import_module
from typing import TYPE_CHECKING

from zerolite.api import compile, full_params, no_sync, shard
from zerolite.checkpoint.load import load
from zerolite.checkpoint.save import save
from zerolite.config import Offload, Precision
from zerolite.errors import CheckpointError, DataError, WorkerError, ZeroliteError
from zerolite.memory.measure import Usage, measure
from zerolite.optim.adam import Adam
from zerolite.optim.adamw import AdamW
from zerolite.optim.lamb import Lamb
from zerolite.optim.lion import Lion

if TYPE_CHECKING:
    from zerolite import adapters
    from zerolite.checkpoint.export import export
    from zerolite.checkpoint.pretrained import load_pretrained
    from zerolite.optim.like import like

__version__ = "0.1.0"  # pyproject.toml reads it here

__all__ = [
    "Adam",
    "AdamW",
    "CheckpointError",
    "DataError",
    "Lamb",
    "Lion",
    "Offload",
    "Precision",
    "Usage",
    "WorkerError",
    "ZeroliteError",
    "adapters",
    "compile",
    "export",
    "full_params",
    "like",
    "load",
    "load_pretrained",
    "measure",
    "no_sync",
    "save",
    "shard",
]

# What imports transformers, which takes as long as torch does: it loads when it is asked for.
_LAZY = {
    "adapters": "zerolite.adapters",
    "export": "zerolite.checkpoint.export",
    "like": "zerolite.optim.like",
    "load_pretrained": "zerolite.checkpoint.pretrained",
}


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_LAZY[name])
    globals()[name] = value = getattr(module, name, module)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
