"""What a checkpoint tells to programs that do not have its model: versions, dtypes, the Hugging Face configuration."""

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from zerolite.checkpoint.slices import saved_names
from zerolite.engine.engine import Engine
from zerolite.runtime.safetensors_file import DTYPES
from zerolite.shards.layout import Slot
from zerolite.shards.shard import Shard
from zerolite.version import __version__

HALF_WAY = 1 + 2.0**-8  # between two numbers of bf16, of which 1 is the even one


def dtypes_of(engine: Engine) -> dict[str, str]:
    """Of this rank's parameters, by the names that they are saved under."""
    names = saved_names(engine)
    return {
        names[slot.name]: DTYPES.get(s.spec.dtype, str(s.spec.dtype)) for s in _shards(engine) for slot in _slots(s)
    }


def ties_away(engine: Engine) -> list[str]:
    """This rank's parameters whose masters half-way between two bf16 numbers are rounded away from zero."""
    names = saved_names(engine)
    return [names[slot.name] for shard in _shards(engine) if _rounds_away(shard) for slot in _slots(shard)]


def about(engine: Engine, dtypes: dict[str, str], ties: list[str]) -> dict[str, Any]:
    """Entries of the manifest; `load` reads none of them. dtypes, ties: as above, of all pipeline stages."""
    return {
        "versions": {"zerolite": __version__, "torch": torch.__version__},
        "model": {
            "class": type(engine.model).__name__,
            "dtypes": dtypes,
            **({"ties_away": ties} if ties else {}),
            **_configurations(engine.model),
        },
    }


def _shards(engine: Engine) -> list[Shard]:
    return [bucket.shard for unit in engine.units for bucket in unit.buckets]


def _slots(shard: Shard) -> Sequence[Slot]:
    return shard.spec.layout.slots


def _rounds_away(shard: Shard) -> bool:
    """As steps in host memory do."""
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
