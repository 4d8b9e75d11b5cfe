"""The model that a Hugging Face folder describes, on the meta device: what a stranger wrote there is a ValueError."""

import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.core_model_loading import build_glob_alternation

from zerolite.checkpoint.conversions import Source, transformers_sources
from zerolite.checkpoint.diffusers_models import CLASS_NAME, diffusers_sources, empty_diffusers_model
from zerolite.checkpoint.weight_files import Weights
from zerolite.engine import meta_init

CPU = torch.device("cpu")


def open_model(folder: Path, weights: Weights) -> tuple[nn.Module, dict[str, Source]]:
    """The model that a folder describes, its parameters on the meta device, and where its values are.

    Raises ValueError and ImportError as below, for a folder that describes no model, or another than it holds.
    """
    if CLASS_NAME in json.loads((folder / "config.json").read_text(encoding="utf-8")):
        model = empty_diffusers_model(folder, weights)
        sources = diffusers_sources(model, weights)
    else:
        model = empty_model(folder, weights)
        sources = transformers_sources(model, weights)
    check_sources(model, weights, sources)
    return model, sources


def empty_model(folder: Path, weights: Weights) -> transformers.PreTrainedModel:
    """The model of `config.json`, its parameters on the meta device, with the folder's generation config.

    Parameters have the dtypes that `from_pretrained` gives them. No code of the folder is run. Raises ValueError, with
    folder and cause, for a configuration that needs such code, that no model can be built from, or that asks for more
    layers than the weights have.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        _check_layers(config, weights)
        if config.dtype is None:
            config.dtype = weights.first_float_dtype()
        model = build_empty(config)
        _keep_in_fp32(model, config.dtype)
        if model.can_generate() and (folder / "generation_config.json").is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises whatever a wrong value happens to hit
        raise ValueError(f"{folder}: config.json cannot be used: {cause_of(error)}") from error
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


def _keep_in_fp32(model: transformers.PreTrainedModel, dtype: torch.dtype) -> None:
    """Parameters that their class keeps in fp32 where the rest is of 16 bits."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    pattern, by_group, _ = build_glob_alternation(list(plan))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        match = pattern.search(name)
        if match is not None and tensor.is_floating_point():
            tensor.data = tensor.data.to(plan[by_group[match.lastgroup]])


def check_sources(model: nn.Module, weights: Weights, sources: dict[str, Source]) -> None:
    """Before memory is taken for what config.json claims: every parameter has values of its shape.

    Parameters whose class lets them be missing (tables that are computed) get their initial values here.
    Raises ValueError for a parameter without values, or with those of another shape, and for a quantised folder.
    """
    parameters = dict(model.named_parameters())
    weights.check_unquantised([*dict(model.named_parameters(remove_duplicate=False)), *dict(model.named_buffers())])
    may_miss = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    missing = [name for name in parameters if name not in sources]
    for name in missing:
        if not any(re.search(pattern, name) for pattern in may_miss):
            raise ValueError(
                f"{weights.folder} holds no weights for {name}: they are of another model than config.json tells, or "
                "files are missing; download all of it"
            )
    for name, tensor in [*parameters.items(), *model.named_buffers()]:
        source = sources.get(name)
        if source is not None and source.shape != tensor.shape:
            keys = " + ".join(source.keys[:2]) + (f" + {len(source.keys) - 2} more" if len(source.keys) > 2 else "")
            raise ValueError(
                f"{keys} in {weights.folder} has shape {tuple(source.shape)}, config.json asks for "
                f"{tuple(tensor.shape)}{'' if keys == name else f' of {name}'}"
            )
    for name in missing:
        parameter = parameters[name]
        filled = nn.Parameter(meta_init.unset_like(parameter, CPU), requires_grad=parameter.requires_grad)
        with meta_init.without_weak_references(model):
            torch.utils.swap_tensors(parameter, filled)
        _initialise(model, name, parameter)
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:  # computed from a parameter when it was built
            owner, _, own_name = name.rpartition(".")
            model.get_submodule(owner)._buffers[own_name] = buffer = meta_init.unset_like(buffer, CPU)
            if name not in sources:
                _initialise(model, name, buffer)


def _initialise(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Give a tensor that is unset the value that its class computes."""
    module = model.get_submodule(name.rpartition(".")[0])
    with torch.no_grad():
        if hasattr(model, "_init_weights"):
            model._init_weights(module)
    if tensor.numel() > 0 and meta_init.is_unset(tensor):
        raise ValueError(f"{name} is not in the folder, and {type(module).__name__} computes no values for it")


def cause_of(error: Exception) -> str:
    """What transformers means, on one line."""
    if "trust_remote_code" in str(error) or "custom code" in str(error):
        return "it needs Python code of the folder (auto_map), which is never run here"
    return f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
