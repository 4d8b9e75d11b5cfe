"""zerolite: ZeRO memory engineering for people who train large models on few GPUs."""

from importlib import import_module
from typing import TYPE_CHECKING

from zerolite.version import __version__ as __version__

if TYPE_CHECKING:
    from zerolite import adapters
    from zerolite.api import compile, full_params, no_sync, shard
    from zerolite.checkpoint.export import export
    from zerolite.checkpoint.load import load
    from zerolite.checkpoint.pretrained import load_pretrained
    from zerolite.checkpoint.save import save
    from zerolite.config import Offload, Precision
    from zerolite.errors import CheckpointError, DataError, WorkerError, ZeroliteError
    from zerolite.memory.measure import Usage, measure
    from zerolite.memory.plan import Plan, plan
    from zerolite.memory.recommend import recommend
    from zerolite.memory.track import track
    from zerolite.optim.adam import Adam
    from zerolite.optim.adamw import AdamW
    from zerolite.optim.lamb import Lamb
    from zerolite.optim.like import like
    from zerolite.optim.lion import Lion

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
    "compile",
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
    "track",
]

# Each name's module is imported when the name is asked for: torch takes over a second and transformers as long again,
# which a command that reads a file (`zerolite inspect`) does without.
_LAZY = {
    "Adam": "zerolite.optim.adam",
    "AdamW": "zerolite.optim.adamw",
    "CheckpointError": "zerolite.errors",
    "DataError": "zerolite.errors",
    "Lamb": "zerolite.optim.lamb",
    "Lion": "zerolite.optim.lion",
    "Offload": "zerolite.config",
    "Plan": "zerolite.memory.plan",
    "Precision": "zerolite.config",
    "Usage": "zerolite.memory.measure",
    "WorkerError": "zerolite.errors",
    "ZeroliteError": "zerolite.errors",
    "adapters": "zerolite.adapters",
    "compile": "zerolite.api",
    "export": "zerolite.checkpoint.export",
    "full_params": "zerolite.api",
    "like": "zerolite.optim.like",
    "load": "zerolite.checkpoint.load",
    "load_pretrained": "zerolite.checkpoint.pretrained",
    "measure": "zerolite.memory.measure",
    "no_sync": "zerolite.api",
    "plan": "zerolite.memory.plan",
    "recommend": "zerolite.memory.recommend",
    "save": "zerolite.checkpoint.save",
    "shard": "zerolite.api",
    "track": "zerolite.memory.track",
}


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_LAZY[name])
    globals()[name] = value = getattr(module, name, module)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
