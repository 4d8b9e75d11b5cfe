"""What a checkpoint tells to programs that do not have its model: versions, dtypes, the Hugging Face configuration."""

import json
from typing import Any

import torch
from torch import nn

from zerolite.checkpoint.slices import saved_names
from zerolite.engine.engine import Engine
from zerolite.runtime.safetensors_file import DTYPES
from zerolite.shards.shard import Shard
from zerolite.version import __version__

HALF_WAY = 1 + 2.0**-8  # between two numbers of bf16, of which 1 is the even one


def about(engine: Engine) -> dict[str, Any]:
    """Entries of the manifest; `load` reads none of them."""
    shards = [bucket.shard for unit in engine.units for bucket in unit.buckets]
    names = saved_names(engine)
    dtypes = {
        names[slot.name]: DTYPES.get(s.spec.dtype, str(s.spec.dtype)) for s in shards for slot in s.spec.layout.slots
    }
    away = [names[slot.name] for shard in shards if _rounds_away(shard) for slot in shard.spec.layout.slots]
    return {
        "versions": {"zerolite": __version__, "torch": torch.__version__},
        "model": {
            "class": type(engine.model).__name__,
            "dtypes": dtypes,
            **({"ties_away": away} if away else {}),
            **_configurations(engine.model),
        },
    }


def _rounds_away(shard: Shard) -> bool:
    """Whether a master half-way between two bf16 numbers is rounded away from zero, as steps in host memory do."""
    if shard.spec.dtype != torch.bfloat16 or shard.spec.stepped_dtype != torch.float32:
        return False
    return shard.round(torch.tensor([HALF_WAY])).item() != 1


def _configurations(model: nn.Module) -> dict[str, Any]:
    """config.json and generation_config.json of a model of transformers; null where it cannot be written as JSON."""
    if not any(cls.__name__ == "PreTrainedModel" for cls in type(model).__mro__):  # without importing transformers
        return {}
    config = _as_json(getattr(model, "config", None))
    if config is not None:
        config["architectures"] = [type(model).__name__]  # as `export` does: a model that was never saved has none
    found = {"config": config}
    generation = _as_json(getattr(model, "generation_config", None))
    return found | ({"generation_config": generation} if generation is not None else {})


def _as_json(config: Any) -> dict[str, Any] | None:
    try:
        return json.loads(config.to_json_string())
    except (AttributeError, TypeError, ValueError):
        return None
