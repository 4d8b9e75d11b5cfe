"""What a checkpoint tells to programs that do not have its model: versions, dtypes, the Hugging Face configuration."""

import json
from typing import Any

import torch
from torch import nn

from zerolite.engine.engine import Engine
from zerolite.runtime.safetensors_file import DTYPES
from zerolite.version import __version__


def about(engine: Engine) -> dict[str, Any]:
    """Entries of the manifest; `load` reads none of them."""
    slots = [
        (slot, bucket.shard.spec.dtype)
        for unit in engine.units
        for bucket in unit.buckets
        for slot in bucket.layout.slots
    ]
    return {
        "versions": {"zerolite": __version__, "torch": torch.__version__},
        "model": {
            "class": type(engine.model).__name__,
            "dtypes": {slot.name: DTYPES.get(dtype, str(dtype)) for slot, dtype in slots},
            **_configurations(engine.model),
        },
    }


def _configurations(model: nn.Module) -> dict[str, Any]:
    """config.json and generation_config.json of a model of transformers; null where it cannot be written as JSON."""
    if not any(cls.__name__ == "PreTrainedModel" for cls in type(model).__mro__):  # without importing transformers
        return {}
    found = {"config": _as_json(getattr(model, "config", None))}
    generation = _as_json(getattr(model, "generation_config", None))
    return found | ({"generation_config": generation} if generation is not None else {})


def _as_json(config: Any) -> dict[str, Any] | None:
    try:
        return json.loads(config.to_json_string())
    except (AttributeError, TypeError, ValueError):
        return None
