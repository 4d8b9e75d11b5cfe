"""The model that a Hugging Face folder describes, on the meta device: what a stranger wrote there is a ValueError."""

from pathlib import Path
from typing import Any

import torch
import transformers

from zerolite.checkpoint.weight_files import Weights
from zerolite.engine import meta_init


def empty_model(folder: Path, weights: Weights) -> transformers.PreTrainedModel:
    """The model of `config.json`, its parameters on the meta device, with the folder's generation config.

    No code of the folder is run. Raises ValueError, with folder and cause, for a configuration that needs such code,
    that no model can be built from, or that asks for other layers and shapes than the weights have.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        _check_layers(config, weights)
        model = build_empty(config)
        if model.can_generate() and (folder / "generation_config.json").is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises whatever a wrong value happens to hit
        raise ValueError(f"{folder}: config.json cannot be used: {cause_of(error)}") from error
    _check_shapes(model, weights)
    return model


def build_empty(config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    """The model of a configuration, its parameters on the meta device. ValueError for an unknown class."""
    architectures = config.architectures or []
    cls: Any = getattr(transformers, architectures[0], None) if architectures else None
    is_model = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    if cls is not None and not is_model:
        raise ValueError(f"architectures names {architectures[0]!r}, which is no model class of transformers")
    dtype = config.dtype or torch.float32

    def make() -> transformers.PreTrainedModel:
        if cls is not None:
            return cls._from_config(config, dtype=dtype)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)

    return meta_init.parameters_on_meta(make)


def _check_layers(config: transformers.PretrainedConfig, weights: Weights) -> None:
    """Before modules are built one by one: a layer has a tensor of its own at least."""
    num_layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(num_layers, int) and num_layers > len(weights.entries):
        raise ValueError(f"it asks for {num_layers:,} layers, and the weights are {len(weights.entries):,} tensors")


def _check_shapes(model: transformers.PreTrainedModel, weights: Weights) -> None:
    """Before memory is taken for what config.json claims."""
    for name, parameter in model.named_parameters():
        if name in weights.entries and weights.shape(name) != tuple(parameter.shape):
            raise ValueError(
                f"{name} in {weights.folder} has shape {weights.shape(name)}, config.json asks for "
                f"{tuple(parameter.shape)}"
            )


def cause_of(error: Exception) -> str:
    """What transformers means, on one line."""
    if "trust_remote_code" in str(error) or "custom code" in str(error):
        return "it needs Python code of the folder (auto_map), which is never run here"
    return f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
