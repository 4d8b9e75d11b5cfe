"""Models to plan for: presets by name, folders of Hugging Face, built without memory; and their default step."""

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from zerolite_kernels.loss import linear_cross_entropy

_LLAMA: dict[str, Any] = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096}
_LLAMA_3: dict[str, Any] = _LLAMA | {"vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 500000.0}


def _shape(base: dict[str, Any], hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **more) -> dict:
    return base | {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **more,
    }


# config.json of each, as published, without what does not change a shape.
PRESETS: dict[str, dict[str, Any]] = {
    "smollm2-135m": _shape(_LLAMA, 576, 1536, 30, 9, 3, vocab_size=49152, tie_word_embeddings=True),
    "llama-7b": _shape(_LLAMA, 4096, 11008, 32, 32, 32),
    "llama-13b": _shape(_LLAMA, 5120, 13824, 40, 40, 40),
    "llama-70b": _shape(_LLAMA, 8192, 28672, 80, 64, 8),
    "llama-3-8b": _shape(_LLAMA_3, 4096, 14336, 32, 32, 8),
    "llama-3-405b": _shape(_LLAMA_3, 16384, 53248, 126, 128, 8),
    "qwen-7b": _shape(_LLAMA, 3584, 18944, 28, 28, 4, model_type="qwen2", vocab_size=152064),
}


def build(name: str | Path) -> nn.Module:
    """The model of a preset, or of a folder's config.json, on the meta device in bf16 or the folder's dtype.

    Nothing is downloaded and no code of a folder is run. Raises ValueError for a name that is neither, and for a
    configuration that transformers cannot build.
    """
    import transformers

    if str(name).lower() in PRESETS:
        values = dict(PRESETS[str(name).lower()])
        config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    else:
        folder = Path(name)
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"{str(name)!r} is no preset ({', '.join(PRESETS)}) and no folder with a config.json: name one of them"
            )
        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises whatever a wrong value happens to hit
            raise ValueError(f"{folder}/config.json cannot be used: {type(error).__name__}: {error}") from error
    dtype = getattr(config, "dtype", None) or torch.bfloat16
    cls: Any = None
    for architecture in config.architectures or []:
        cls = getattr(transformers, architecture, None)
    try:
        with torch.device("meta"):
            if cls is not None and issubclass(cls, transformers.PreTrainedModel):
                return cls._from_config(config, dtype=dtype)
            return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # as above
        raise ValueError(
            f"{name}: no model can be built of its config.json: {type(error).__name__}: {error}"
        ) from error


def language_model_step(batch: int, length: int, is_chunked: bool) -> Callable[[nn.Module], torch.Tensor]:
    """One forward of a model of transformers on `batch` rows of `length` tokens, all with labels; returns its loss.

    is_chunked: the output layer takes hidden states to the summed loss, a chunk of tokens at a time, and the logits are
        never whole, as train_medqa.py does it.
    """

    def step(model: nn.Module) -> torch.Tensor:
        # Drawn, since equal tokens would all go to the same experts.
        tokens = torch.randint(0, model.get_input_embeddings().weight.shape[0], (batch, length))
        inputs: dict[str, Any] = {"input_ids": tokens}
        if "use_cache" in inspect.signature(model.forward).parameters:
            inputs["use_cache"] = False
        if not is_chunked:
            return model(**inputs, labels=tokens).loss
        head, losses, returned = model.get_output_embeddings(), [], []
        targets = torch.zeros(batch * length, dtype=torch.int64)

        def loss_of(hidden: torch.Tensor) -> torch.Tensor:
            hidden = hidden[:, -length:].flatten(0, 1)  # virtual tokens of a prompt come first
            losses.append(linear_cross_entropy(hidden, head.weight, targets, head.bias, ignore_index=None))
            return losses[-1]

        def remember(module, args, output) -> None:
            returned.append(output.logits)

        head.forward = loss_of
        hook = model.register_forward_hook(remember, prepend=True)  # before loss scaling changes it
        try:
            output = model(**inputs)
        finally:
            del head.forward
            hook.remove()
        if returned[0] is not losses[0]:
            raise ValueError(
                f"chunked_loss=True needs a model that returns what its output layer gives; {type(model).__name__} "
                "changes its logits"
            )
        return output.logits

    return step


@contextlib.contextmanager
def rows_are_not_packed() -> Iterator[None]:
    """Inside, transformers does not look at positions for packed rows.

    Without values it would assume some, and mask where a run has fused causal attention and no mask.
    """
    masks: Any = sys.modules.get("transformers.masking_utils")
    find = getattr(masks, "find_packed_sequence_indices", None)
    if masks is None or find is None:
        yield
        return
    masks.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masks.find_packed_sequence_indices = find


def check_language_model(model: nn.Module, is_chunked: bool) -> None:
    """ValueError for a model that `language_model_step` cannot run."""
    config = getattr(model, "config", None)
    if not hasattr(config, "to_json_string") or not hasattr(model, "get_output_embeddings"):
        raise ValueError(
            f"{type(model).__name__} is no language model of transformers, so its inputs are not known: pass "
            "step=function(model) -> loss that makes its inputs, or batch=None for model states alone"
        )
    if is_chunked and (
        getattr(config, "is_encoder_decoder", False) or type(model.get_output_embeddings()) is not nn.Linear
    ):
        raise ValueError(
            f"chunked_loss=True needs a decoder with a plain linear output layer, not {type(model).__name__}"
        )


def longest(model: nn.Module) -> int | None:
    """Positions that the model has, where its config says."""
    text = getattr(getattr(model, "config", None), "get_text_config", lambda: None)()
    return getattr(text, "max_position_embeddings", None)


def name_of(model: nn.Module | str | Path) -> str:
    """What a plan calls the model."""
    return type(model).__name__ if isinstance(model, nn.Module) else str(model)
