"""zerolite: ZeRO memory engineering for people who train large models on few GPUs."""

from importlib import import_module
from typing import TYPE_CHECKING

from zerolite.api import full_params, no_sync, shard
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
    from zerolite.memory.plan import Plan, plan
    from zerolite.memory.recommend import recommend
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
    "Plan",
    "Precision",
    "Usage",
    "WorkerError",
    "ZeroliteError",
    "adapters",
    "export",
    "full_params",
    "like",
    "load",
    "load_pretrained",
    "measure",
    "no_sync",
    "plan",
    "recommend",
    "save",
    "shard",
]

# What imports transformers, which takes as long as torch does, or torch's fake tensors: it loads when it is asked for.
_LAZY = {
    "Plan": "zerolite.memory.plan",
    "adapters": "zerolite.adapters",
    "export": "zerolite.checkpoint.export",
    "like": "zerolite.optim.like",
    "load_pretrained": "zerolite.checkpoint.pretrained",
    "plan": "zerolite.memory.plan",
    "recommend": "zerolite.memory.recommend",
}


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_LAZY[name])
    globals()[name] = value = getattr(module, name, module)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
