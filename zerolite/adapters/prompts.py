"""Prompt tuning, prefix tuning and both P-tunings: adding virtual tokens to a model, and to its forwards."""

import functools
import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from zerolite.adapters import heads
from zerolite.adapters.config import DEEP_KINDS, KINDS, PromptConfig
from zerolite.adapters.prefix import attentions_of, cache_keyword, give_prefix, install_prefix
from zerolite.adapters.state import Adapters, adapters_of, adopt, begin, disabled, evaluating
from zerolite.adapters.virtual_tokens import Shape, VirtualTokens, shape_of

IGNORED = -100  # the label that transformers' losses leave out


def add_prompt(
    model: nn.Module,
    kind: str = "prompt",
    tokens: int = 20,
    *,
    init: str | None = None,
    text_ids: Sequence[int] | None = None,
    encoder: str | None = None,
    encoder_hidden: int | None = None,
    name: str = "default",
) -> nn.Module:
    """Add `tokens` trainable virtual tokens to a decoder of transformers, in place; returns the model, its base frozen.

    kind: "prompt" puts embeddings in front of the input (Lester et al. 2021). "p-tuning" passes them through an encoder
        first (Liu et al. 2021, GPT Understands, Too). "prefix" puts keys and values in front of every layer's (Li and
        Liang 2021), and so does "p-tuning-v2", which has no encoder (Liu et al. 2022).
    init: "vocabulary": embeddings of tokens drawn at random. "text": embeddings of `text_ids`, repeated or cut to
        length. For prefixes both mean the keys and values that the model computes for these tokens. "zeros": prefixes
        only. "random": a normal distribution, as PEFT's. None: "text" where there are `text_ids`; else "vocabulary"
        without an encoder, "zeros" for a prefix with one, "random" for p-tuning. With an encoder only "random" and,
        for a prefix, "zeros" are possible.
    text_ids: token ids of a text, such as the instruction of the task.
    encoder: "mlp" or "lstm" for p-tuning (default "mlp"), "mlp" or None for a prefix.
    encoder_hidden: hidden size of the encoder; None: the size of its input.

    The model is called as before. With "prompt" and "p-tuning" its logits begin with those of the virtual tokens, as
    PEFT's do; labels are padded here, and `logits_to_keep` counts from the end. Positions count virtual and then real
    tokens: those that the caller or `generate` passes, else those of the attention_mask, so that a row's logits do not
    depend on its padding (PEFT counts padding).
    Parameters are fp32, or fp64 where the model is. Call it before `zerolite.shard`, on every rank alike. On a model on
    the meta device, `shard` or `load_pretrained` computes the initial values that need the model.
    Raises TypeError for a model that is not of transformers; ValueError for an encoder-decoder, for a new head (of a
    classifier), for a kind, init, encoder or text_ids that do not go together, for a name that is taken, and for a
    sharded model. A forward that does not pass the virtual tokens is a ValueError.
    """
    config = _resolved(kind, tokens, init, text_ids, encoder, encoder_hidden, shape_of_supported(model))
    source_ids = _source_ids(model, config, text_ids) if config.init in ("vocabulary", "text") else None
    virtual_tokens = attach(model, config, name)
    if source_ids is not None:
        virtual_tokens.source_ids = source_ids.to(virtual_tokens.embedding.device)
        if not any(parameter.is_meta for parameter in model.parameters()):
            compute_initial_values(model)
    return model


def shape_of_supported(model: nn.Module) -> Shape:
    """The sizes of a model that can have virtual tokens; TypeError or ValueError for any other model."""
    if not hasattr(model, "config") or not hasattr(model, "get_input_embeddings"):
        raise TypeError(f"virtual tokens are added to a model of transformers, got {type(model).__name__}")
    if model.config.is_encoder_decoder:
        raise ValueError(f"virtual tokens are added to decoders, {type(model).__name__} is an encoder-decoder")
    if head := heads.task_head(model):
        raise ValueError(
            f"{type(model).__name__} has a new head ({', '.join(head)}), which virtual tokens would leave random and "
            "frozen: use add_lora, which trains it, or a model with a language-model head"
        )
    shape, width = shape_of(model), model.get_input_embeddings().embedding_dim
    if width != shape.hidden:
        raise ValueError(
            f"{type(model).__name__} has embeddings of width {width} and layers of width {shape.hidden}: virtual "
            "tokens are added where both are one"
        )
    return shape


def decoder_of(model: nn.Module) -> nn.Module:
    """The module whose forward virtual tokens enter: what a model calls its decoder, else its base model.

    Some models (OPT, BART's decoder, vision-language models) call it without calling their base model.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return decoder if isinstance(decoder, nn.Module) and decoder is not model else model.base_model


def _resolved(
    kind: str,
    tokens: int,
    init: str | None,
    text_ids: Sequence[int] | None,
    encoder: str | None,
    encoder_hidden: int | None,
    shape: Shape,
) -> PromptConfig:
    """The configuration with its defaults; ValueError for arguments that do not go together."""
    if kind not in KINDS:
        raise ValueError(f"kind= is one of {', '.join(KINDS)}, got {kind!r}")
    if not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"tokens= is how many virtual tokens there are, at least 1, got {tokens!r}")
    encoders = {"prompt": (None,), "p-tuning": ("mlp", "lstm"), "prefix": (None, "mlp"), "p-tuning-v2": (None,)}[kind]
    encoder = "mlp" if kind == "p-tuning" and encoder is None else encoder
    if encoder not in encoders:
        raise ValueError(f"encoder= of kind {kind!r} is one of {encoders}, got {encoder!r}")
    if encoder_hidden is not None and (encoder is None or encoder_hidden < 1):
        raise ValueError(
            f"encoder_hidden={encoder_hidden!r} is the positive size of an encoder, got encoder={encoder!r}"
        )
    is_deep = kind in DEEP_KINDS
    if encoder is None:
        default, inits = "vocabulary", ("vocabulary", "text", "random", *(("zeros",) if is_deep else ()))
    else:
        default, inits = ("zeros", ("zeros", "random")) if is_deep else ("random", ("random",))
    init = init or ("text" if text_ids is not None else default)
    if init not in inits:
        raise ValueError(f"init= of kind {kind!r} with encoder={encoder!r} is one of {inits}, got {init!r}")
    if (init == "text") != (text_ids is not None) or (text_ids is not None and len(text_ids) == 0):
        raise ValueError(f"init='text' starts from text_ids=, at least one token id, got init={init!r}, {text_ids=}")
    if encoder is not None and encoder_hidden is None:
        encoder_hidden = shape.heads * shape.head_dim if is_deep else shape.hidden
    return PromptConfig(kind, tokens, init, encoder, encoder_hidden)


def attach(model: nn.Module, config: PromptConfig, name: str) -> VirtualTokens:
    """Add virtual tokens to a model, as its active adapter, with zeros or random values."""
    shape = shape_of_supported(model)
    base = decoder_of(model)
    attentions = attentions_of(base, shape.layers) if config.is_deep else []
    adapter = begin(model, name, config, compute_initial_values)
    if not hasattr(model, "prompts"):
        model.prompts = Prompts(adapters_of(model))
        model.register_forward_pre_hook(model.prompts.before_model, with_kwargs=True)
        model.register_forward_hook(model.prompts.after_model)
        base.register_forward_pre_hook(model.prompts.before_decoder, with_kwargs=True)
    if config.is_deep and not any(other.config.is_deep for other in model.prompts.values()):
        install_prefix(base, attentions)
    like = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    device = torch.device("cpu") if like.is_meta else like.device
    dtype = torch.promote_types(like.dtype, torch.float32)
    model.prompts[name] = VirtualTokens(config, shape, dtype, device)
    adopt(model, adapter)
    return model.prompts[name]


# Forward #


class Prompts(nn.ModuleDict):
    """The virtual tokens of a model, by the adapter's name; a forward uses those of the active adapter.

    Its methods are the hooks, so a deep copy of the model has hooks of its own. Tensors that need a gradient enter at
    the decoder, inside the model's forward: hooks of the model itself (a loss scaler's) see the caller's inputs only.
    """

    def __init__(self, adapters: Adapters):
        super().__init__()
        self.adapters = adapters
        self.is_passed = False  # the decoder's forward has begun inside this forward of the model

    def current(self) -> VirtualTokens | None:
        """The virtual tokens that forwards use now; None: the active adapter is no prompt, or is off."""
        adapter = self.adapters.current
        return self[adapter.name] if adapter is not None and isinstance(adapter.config, PromptConfig) else None

    def before_model(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Pre-hook of the model: virtual tokens that have logits get the label IGNORED."""
        current = self.current()
        self.is_passed = False
        if current is None or current.config.is_deep:
            return None
        inputs = _by_name(model, args, kwargs)
        count = current.config.tokens
        if inputs.get("labels") is not None:
            inputs["labels"] = nn.functional.pad(inputs["labels"], (count, 0), value=IGNORED)
        if isinstance(inputs.get("logits_to_keep"), Tensor):
            inputs["logits_to_keep"] = inputs["logits_to_keep"] + count  # positions of real tokens
        return (), inputs

    def after_model(self, model: nn.Module, args: tuple, output: object) -> None:
        """Hook of the model: ValueError where its forward has not passed the virtual tokens."""
        if self.current() is not None and not self.is_passed:
            raise ValueError(
                f"the forward of {type(model).__name__} does not call {type(decoder_of(model)).__name__}, where "
                "virtual tokens enter: they would have no effect; use add_lora"
            )

    def before_decoder(self, base: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Pre-hook of the decoder: puts the virtual tokens in front, unless its cache holds them already."""
        current = self.current()
        if current is None:
            return None
        self.is_passed = True
        inputs = _by_name(base, args, kwargs)
        count = current.config.tokens
        keyword = cache_keyword(type(base).forward)
        cache = None if keyword is None else inputs.get(keyword)
        _refuse_unsupported(inputs, cache, current.config)
        is_first = cache is None or cache.get_seq_length() == 0
        _count_positions(base, inputs, current.config, is_first)
        if inputs.get("attention_mask") is not None:
            inputs["attention_mask"] = nn.functional.pad(inputs["attention_mask"], (count, 0), value=1)
        if current.config.is_deep:
            if is_first:
                give_prefix(base, inputs, current.keys_values())
        elif is_first:
            embeds = inputs.get("inputs_embeds")
            if embeds is None:
                embeds = base.get_input_embeddings()(inputs["input_ids"])
            prompt = current().to(embeds.dtype).expand(embeds.shape[0], -1, -1)
            inputs["inputs_embeds"] = torch.cat([prompt, embeds], dim=1)
            inputs["input_ids"] = None
        return (), inputs


def _count_positions(base: nn.Module, inputs: dict, config: PromptConfig, is_first: bool) -> None:
    """Change position_ids to those behind the virtual tokens; padding is not counted, as `generate` counts.

    Without position_ids and attention_mask, or where the decoder takes no position_ids, it counts by itself.
    """
    position_ids, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    if "position_ids" not in _parameter_names(type(base).forward):
        return
    if position_ids is None:
        if mask is None:
            return
        length = next(inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None).shape[1]
        position_ids = (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -length:]
    position_ids = position_ids + config.tokens
    if is_first and not config.is_deep:
        virtual = torch.arange(config.tokens, device=position_ids.device, dtype=position_ids.dtype)
        position_ids = torch.cat([virtual.expand(*position_ids.shape[:-1], -1), position_ids], dim=-1)
    inputs["position_ids"] = position_ids


def _refuse_unsupported(inputs: dict, cache: Cache | None, config: PromptConfig) -> None:
    mask, position_ids = inputs.get("attention_mask"), inputs.get("position_ids")
    if (
        mask is not None
        and not (isinstance(mask, Tensor) and mask.dim() == 2)
        or getattr(cache, "is_compileable", False)
    ):
        raise ValueError(
            "virtual tokens come in front of rows with a 2-D attention_mask (batch, length) and a cache that grows: "
            "static caches (cache_implementation='static') and ready-made 4-D masks have no room for them"
        )
    counts_alone = mask is None and cache is None
    if position_ids is not None and counts_alone and (position_ids[..., 1:] <= position_ids[..., :-1]).any():
        raise ValueError(
            "these position_ids start anew within a row, which packs several sequences: virtual tokens come in front "
            "of the first only; pad the rows and pass attention_mask"
        )
    if inputs.get("token_type_ids") is not None and not config.is_deep:
        raise ValueError(f"virtual tokens of kind {config.kind!r} have no token_type_ids: leave them out")


def _by_name(module: nn.Module, args: tuple, kwargs: dict) -> dict:
    """All arguments of a module's forward as keywords: a new dict, which a pre-hook may change."""
    return {**dict(zip(_parameter_names(type(module).forward), args, strict=False)), **kwargs}


@functools.cache
def _parameter_names(forward: Callable) -> list[str]:
    return list(inspect.signature(forward).parameters)[1:]


# Initial values #


def _source_ids(model: nn.Module, config: PromptConfig, text_ids: Sequence[int] | None) -> Tensor:
    vocabulary = model.get_input_embeddings().num_embeddings
    if text_ids is None:
        return torch.randint(vocabulary, (config.tokens,))
    ids = torch.as_tensor(text_ids, dtype=torch.long, device="cpu").flatten()
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise ValueError(f"text_ids= are ids below {vocabulary}, got {ids.min().item()} to {ids.max().item()}")
    return ids.repeat(-(-config.tokens // len(ids)))[: config.tokens]


@torch.no_grad()
def compute_initial_values(model: nn.Module) -> None:
    """Compute initial values that need the base model and could not be had on the meta device. Collective if sharded.

    Called once the base has its weights and buffers, before any training step. Every rank runs the same forwards and
    writes the same values into its unsharded prompts.
    """
    for virtual_tokens in getattr(model, "prompts", {}).values():
        if virtual_tokens.source_ids is not None:
            ids = virtual_tokens.source_ids
            values = _keys_values_of(model, ids) if virtual_tokens.config.is_deep else model.get_input_embeddings()(ids)
            virtual_tokens.embedding.copy_(values)
            virtual_tokens.source_ids = None


def _keys_values_of(model: nn.Module, ids: Tensor) -> Tensor:
    """The base model's keys and values for these tokens, as a prefix: (tokens, layers * 2 * heads * head_dim)."""
    cache, keyword = DynamicCache(), cache_keyword(type(model).forward)
    assert keyword is not None, f"{type(model).__name__} has prefixes, but its forward takes no cache"
    with disabled(model), evaluating(model):
        model(input_ids=ids[None], use_cache=True, **{keyword: cache})
    keys_values = torch.stack([part[0] for layer in cache.layers for part in (layer.keys, layer.values)])
    return keys_values.permute(2, 0, 1, 3).flatten(1)  # from (2 * layers, heads, tokens, head_dim)
