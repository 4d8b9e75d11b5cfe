"""Virtual tokens in PEFT's format: a configuration and one tensor, the virtual tokens as they enter the model.

The file holds an encoder's output, not the encoder: a forward needs no more. So `from_peft` adds a prompt without an
encoder, which gives the same logits and then trains the virtual tokens themselves. zerolite.save keeps an encoder.
"""

from typing import Any

import torch
from torch import Tensor, nn

from zerolite.adapters.config import PromptConfig
from zerolite.adapters.prompts import attach, shape_of_supported
from zerolite.adapters.state import Adapter
from zerolite.adapters.virtual_tokens import Shape

TENSOR = "prompt_embeddings"

PEFT_TYPES = {
    "prompt": "PROMPT_TUNING",
    "p-tuning": "P_TUNING",
    "prefix": "PREFIX_TUNING",
    "p-tuning-v2": "PREFIX_TUNING",
}
KINDS = {"PROMPT_TUNING": "prompt", "P_TUNING": "p-tuning", "PREFIX_TUNING": "prefix"}

# Keys that change no forward of a loaded adapter: its origin, its initialisation, the shape of its encoder.
WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "encoder_dropout", "encoder_hidden_size", "encoder_num_layers",
    "encoder_reparameterization_type", "inference_mode", "init_weights", "peft_type", "peft_version",
    "prefix_projection", "prompt_tuning_init", "prompt_tuning_init_text", "revision", "tokenizer_kwargs",
    "tokenizer_name_or_path",
}  # fmt: skip


def to_peft(model: nn.Module, adapter: Adapter) -> tuple[dict, dict[str, Tensor]]:
    """(adapter_config.json, tensors by PEFT's names) of a prompt; a copy on the CPU in the parameters' dtype.

    The prompt's parameters must be unsharded. It runs the prompt's encoder, so every rank calls it.
    """
    virtual_tokens = model.prompts[adapter.name]
    with torch.no_grad():
        tensor = virtual_tokens().detach().cpu().contiguous().clone()
    config: PromptConfig = virtual_tokens.config
    shape: Shape = virtual_tokens.shape
    entries: dict[str, Any] = {
        "peft_type": PEFT_TYPES[config.kind],
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "revision": None,
        "auto_mapping": None,
        "modules_to_save": None,
        "inference_mode": True,
        "num_virtual_tokens": config.tokens,
        **_sizes(model, config.is_deep, shape),
    }
    if config.is_deep:
        entries |= {
            "prefix_projection": config.encoder is not None,
            "encoder_hidden_size": config.encoder_hidden or entries["token_dim"],
            "init_weights": "zero" if config.init == "zeros" else None,
        }
    elif config.kind == "p-tuning":
        entries |= {
            "encoder_reparameterization_type": (config.encoder or "mlp").upper(),
            "encoder_hidden_size": config.encoder_hidden or shape.hidden,
            "encoder_num_layers": 2,
            "encoder_dropout": 0.0,
        }
    else:
        # RANDOM, however it began: the file has the values, and for TEXT PEFT would ask for the text's tokenizer.
        entries |= {
            "prompt_tuning_init": "RANDOM",
            "prompt_tuning_init_text": None,
            "tokenizer_name_or_path": None,
            "tokenizer_kwargs": None,
        }
    return entries, {TENSOR: tensor}


def from_peft(model: nn.Module, name: str, config: dict, tensors: dict[str, Tensor]) -> None:
    """Add a prompt with PEFT's configuration and values to a model that is not sharded, as its active adapter.

    Raises ValueError, with key and value, for a configuration that does not fit the model or is not supported, and for
    tensors of another shape.
    """
    virtual_tokens = attach(model, check(model, config, tensors), name)
    with torch.no_grad():
        virtual_tokens.embedding.copy_(tensors[TENSOR])


def check(model: nn.Module, config: dict, tensors: dict[str, Tensor]) -> PromptConfig:
    """What `from_peft` adds; it raises what that raises. `tensors` may lie on the meta device."""
    kind, num_tokens = KINDS[config["peft_type"]], config.get("num_virtual_tokens")
    if not isinstance(num_tokens, int) or isinstance(num_tokens, bool) or num_tokens < 1:
        raise ValueError(f"adapter_config.json has num_virtual_tokens={num_tokens!r:.80}: expected a number from 1")
    prompt = PromptConfig(kind, num_tokens, init="random")
    shape = shape_of_supported(model)
    _check(config, _sizes(model, prompt.is_deep, shape))
    width = shape.layers * 2 * shape.heads * shape.head_dim if prompt.is_deep else shape.hidden
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    expected = {TENSOR: (prompt.tokens, width)}
    if found != expected:
        raise ValueError(f"a file of peft_type {config['peft_type']} holds {expected} for this model, got {found}")
    return prompt


def _sizes(model: nn.Module, is_deep: bool, shape: Shape) -> dict[str, int]:
    """The model's sizes as PEFT writes them. For a prefix: key and value heads, `token_dim` = heads * head_dim."""
    heads = shape.heads if is_deep else model.config.get_text_config(decoder=True).num_attention_heads
    return {
        "num_transformer_submodules": 1,
        "num_layers": shape.layers,
        "num_attention_heads": heads,
        "token_dim": shape.heads * shape.head_dim if is_deep else shape.hidden,
    }


def _check(config: dict, sizes: dict[str, int]) -> None:
    for key, value in config.items():
        if key in WITHOUT_EFFECT or key == "num_virtual_tokens" or value is None:
            continue
        supported = sizes.get(key, "CAUSAL_LM" if key == "task_type" else None)
        if value != supported:
            raise ValueError(
                f"adapter_config.json has {key}={value!r:.80}: for this model and peft_type {config['peft_type']} only "
                f"{supported!r} is supported"
            )
