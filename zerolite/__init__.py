"""zerolite: ZeRO memory engineering for people who train large models on few GPUs."""

from zerolite import adapters
from zerolite.api import full_params, no_sync, shard
from zerolite.checkpoint.export import export
from zerolite.checkpoint.load import load
from zerolite.checkpoint.pretrained import load_pretrained
from zerolite.checkpoint.save import save
from zerolite.config import Offload, Precision
from zerolite.errors import CheckpointError, DataError, WorkerError, ZeroliteError
from zerolite.memory.measure import Usage, measure
from zerolite.optim.optimizers import Adam, AdamW, Lamb, Lion

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
    "export",
    "full_params",
    "load",
    "load_pretrained",
    "measure",
    "no_sync",
    "save",
    "shard",
]
