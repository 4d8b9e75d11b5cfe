"""zerolite: ZeRO memory engineering for people who train large models on few GPUs."""

from zerolite.api import full_params, no_sync, shard
from zerolite.checkpoint import load, save
from zerolite.config import Precision
from zerolite.errors import CheckpointError, DataError, ZeroliteError
from zerolite.memory.track import Usage, measure
from zerolite.optim.optimizers import Adam, AdamW, Lamb, Lion
from zerolite.pretrained import export, load_pretrained

__all__ = [
    "Adam",
    "AdamW",
    "CheckpointError",
    "DataError",
    "Lamb",
    "Lion",
    "Precision",
    "Usage",
    "ZeroliteError",
    "export",
    "full_params",
    "load",
    "load_pretrained",
    "measure",
    "no_sync",
    "save",
    "shard",
]
