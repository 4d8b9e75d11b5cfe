"""zerolite: ZeRO memory engineering for people who train large models on few GPUs."""

from zerolite.api import full_params, no_sync, shard
from zerolite.config import Precision
from zerolite.errors import CheckpointError, DataError, ZeroliteError
from zerolite.optim.optimizers import Adam, AdamW, Lamb, Lion

__all__ = [
    "Adam",
    "AdamW",
    "CheckpointError",
    "DataError",
    "Lamb",
    "Lion",
    "Precision",
    "ZeroliteError",
    "full_params",
    "no_sync",
    "shard",
]
