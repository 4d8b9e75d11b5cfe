"""Models of diffusers: built without memory from a folder's config.json, and where the folder has their values.

diffusers is imported here alone, and only for a folder that is one of its models.
"""

import json
import sys
from pathlib import Path
from typing import Any

from torch import nn

from zerolite.checkpoint.conversions import Source
from zerolite.checkpoint.file_tensors import FileTensor
from zerolite.checkpoint.weight_files import Weights
from zerolite.engine import meta_init

CLASS_NAME = "_class_name"  # in config.json, which transformers' files have not


def is_diffusers(model: nn.Module) -> bool:
    """Whether it is a `diffusers.ModelMixin`; diffusers is not imported for it."""
    models = sys.modules.get("diffusers.models.modeling_utils")
    return models is not None and isinstance(model, models.ModelMixin)


def empty_diffusers_model(folder: Path, weights: Weights) -> nn.Module:
    """The model of `config.json`, its parameters on the meta device, in fp32 as `from_pretrained` has them.

    Raises ValueError, with folder and cause, for a configuration that no model can be built from, and ImportError where
    diffusers is missing.
    """
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(f"{folder} is a model of diffusers: pip install 'zerolite[diffusion]' ({error})") from error
    try:
        name = json.loads((folder / "config.json").read_text(encoding="utf-8"))[CLASS_NAME]
        cls: Any = getattr(diffusers, name, None) if isinstance(name, str) else None
        is_model = isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)
        if not is_model:
            raise ValueError(f"{CLASS_NAME} names {str(name)[:80]!r}, which is no model class of diffusers")
        config = cls.load_config(folder, local_files_only=True)
        for key, value in config.items():
            if key.endswith("layers") and isinstance(value, int) and value > len(weights.entries):
                raise ValueError(f"{key} asks for {value:,}, and the weights are {len(weights.entries):,} tensors")
        model = meta_init.parameters_on_meta(lambda: cls.from_config(config))
    except Exception as error:  # diffusers raises whatever a wrong value happens to hit
        raise ValueError(f"{folder}: config.json cannot be used: {type(error).__name__}: {error}") from error
    model.register_to_config(_name_or_path=str(folder))
    return model


def diffusers_sources(model: nn.Module, weights: Weights) -> dict[str, Source]:
    """By name in the state dict; old names of attention are those that diffusers itself renames."""
    keys = {key: key for key in weights.entries}
    if len(weights.names) == 1 and hasattr(model, "_fix_state_dict_keys_on_load"):
        model._fix_state_dict_keys_on_load(keys)
    sources: dict[str, Source] = {}
    for name, tensor in model.state_dict().items():
        if name in keys:
            weights.check_dtype(keys[name], tensor.dtype)
            sources[name] = FileTensor.of(keys[name], weights.shape(keys[name]))
    return sources
