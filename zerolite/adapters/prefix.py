"""Prefixes: keys and values of virtual tokens in front of each attention's own.

[Note: a prefix is a cache that only reads]
The prefix is the model's cache. So the model's own code counts it in masks and position ids, and attention
concatenates it. It stores nothing, so a layer may run twice, as under activation checkpointing. There, transformers
takes the cache away from each layer, since a usual cache would be written twice. Checkpointing keeps other keyword
arguments for the recomputation: the prefix is passed a second time as the keyword PREFIX, and a hook of each attention
module makes that its cache.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

PREFIX = "zerolite_prefix"


class PrefixLayer(DynamicLayer):
    """One layer's prefix, in front of every batch: keys and values of (1, heads, tokens, head_dim)."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self.is_read = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """(prefix and keys, prefix and values) for attention; nothing is stored."""
        self.is_read = True
        return _in_front(self.keys, key_states), _in_front(self.values, value_states)


def _in_front(prefix: Tensor, states: Tensor) -> Tensor:
    return torch.cat([prefix.to(states.dtype).expand(states.shape[0], -1, -1, -1), states], dim=-2)


def give_prefix(base: nn.Module, inputs: dict, keys_values: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Change a decoder's keyword arguments, whose cache is empty, so that its forward begins with the prefix.

    A forward that fills a cache for its caller: the prefix is written into that cache, where later forwards find it.
    Any other forward: the prefix is the cache, see [Note: a prefix is a cache that only reads].
    Raises ValueError under reentrant activation checkpointing.
    """
    keyword = cache_keyword(type(base).forward)
    uses_cache = inputs.get("use_cache")
    uses_cache = base.config.use_cache if uses_cache is None else uses_cache
    is_checkpointing = getattr(base, "gradient_checkpointing", False) and base.training
    if inputs.get(keyword) is None and (is_checkpointing or not uses_cache):
        inputs[keyword] = Cache(layers=[PrefixLayer(keys, values) for keys, values in keys_values])
        if is_checkpointing:
            _refuse_reentrant(base)
            inputs[PREFIX] = inputs[keyword]
        return
    if inputs.get(keyword) is None:
        inputs[keyword] = DynamicCache(config=base.config)
    rows = next(inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None).shape[0]
    for index, (keys, values) in enumerate(keys_values):
        keys, values = (part.to(base.dtype).expand(rows, -1, -1, -1) for part in (keys, values))
        inputs[keyword].update(keys, values, index)


def install_prefix(base: nn.Module, attentions: list[nn.Module]) -> None:
    """Install the hooks that prefixes need, on a decoder and its attention modules; once a model."""
    for attention in attentions:
        attention.register_forward_pre_hook(_find_prefix, with_kwargs=True)
    base.register_forward_hook(_take_prefix_back, with_kwargs=True)
    for layer in base.modules():
        if hasattr(layer, "_can_checkpoint_with_cache"):
            layer._can_checkpoint_with_cache = True  # else transformers logs, wrongly here, that the cache is dropped


def _find_prefix(attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Pre-hook of an attention module: the keyword PREFIX, where it is passed, becomes the cache."""
    if PREFIX not in kwargs:
        return None
    kwargs = dict(kwargs)
    kwargs[cache_keyword(type(attention).forward)] = kwargs.pop(PREFIX)
    return args, kwargs


def _take_prefix_back(base: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    """Forward hook of the decoder: removes the prefix from the output. ValueError where a layer did not read it."""
    cache = kwargs.get(cache_keyword(type(base).forward))
    if not isinstance(cache, Cache) or not all(isinstance(layer, PrefixLayer) for layer in cache.layers):
        return None
    unread = [index for index, layer in enumerate(cache.layers) if not layer.is_read]
    if unread:
        raise ValueError(
            f"{type(base).__name__} does not hand the prefix on to the attention of layers {unread}: with activation "
            "checkpointing, prefixes need decoder layers that pass keyword arguments on to attention; switch "
            "checkpointing off, or use kind='prompt'"
        )
    if isinstance(output, tuple):
        return tuple(part for part in output if part is not cache)
    return type(output)(**{name: part for name, part in output.items() if part is not cache})


def attentions_of(base: nn.Module, layers: int) -> list[nn.Module]:
    """The attention modules of a decoder, one a layer; ValueError where their number is another."""
    found = [m for m in base.modules() if hasattr(m, "layer_idx") and cache_keyword(type(m).forward) is not None]
    found = [m for m in found if not any(child in found for child in m.modules() if child is not m)]  # innermost
    if len(found) != layers:
        raise ValueError(
            f"{type(base).__name__} has {len(found)} attention modules with a cache for {layers} layers: a prefix is "
            "supported where every layer has one; use kind='prompt'"
        )
    return found


@functools.cache
def cache_keyword(forward: Callable) -> str | None:
    """The name of a forward's cache argument: "cache" since transformers 5.2x, "past_key_values" before."""
    parameters = inspect.signature(forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in parameters), None)


def _refuse_reentrant(base: nn.Module) -> None:
    function = getattr(base, "_gradient_checkpointing_func", None)
    if getattr(function, "keywords", {}).get("use_reentrant"):
        raise ValueError(
            "reentrant activation checkpointing sends no gradient to a prefix: call gradient_checkpointing_enable("
            'gradient_checkpointing_kwargs={"use_reentrant": False})'
        )
