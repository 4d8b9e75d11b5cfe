"""Merging a LoRA adapter into the base's weights, and measuring what the rounding of the weights changed."""

import contextlib
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from zerolite.adapters import heads
from zerolite.adapters.config import LoraConfig
from zerolite.adapters.lora import layers_of
from zerolite.adapters.state import Adapters, adapter_of, adapters_of, evaluating
from zerolite.adapters.walk import unsharded_parameters
from zerolite.engine.engine import find_engine
from zerolite.errors import ZeroliteError

ROWS, LENGTH = 2, 16  # of the default batch


def merge(model: nn.Module, name: str | None = None, batch: dict[str, Tensor] | None = None) -> float:
    """Add a LoRA adapter into the base's weights: the active one, or the one called `name`. Collective if sharded.

    W becomes W + scale B A, computed in fp32 (fp64 for fp64) and rounded once to W's dtype; with DoRA its rows are also
    scaled to the magnitude. Modules that it trains whole replace the base's. Forwards leave the adapter out from then
    on, and `zerolite.export` writes the merged model.
    At stage 3 one unit is gathered at a time.
    batch: keyword arguments for the model; None: random token ids, the same on every rank.
    Returns the largest absolute difference between the logits of the adapted and of the merged model, over all ranks.
    Raises ValueError for an adapter that is no LoRA or is merged already, and for a weight tied to another module's.
    Raises ZeroliteError where the adapter holds NaN or Inf. In both cases no weight has changed.
    """
    check_merge(model, name)
    adapter, adapters = adapter_of(model, name), adapters_of(model)
    engine = find_engine(model)
    if engine is not None:
        engine.fetch()
    layers = layers_of(model, adapter.name)
    copies = heads.values_of(model, adapter)
    copied = heads.parameter_names(adapter)
    values = [p for name, p in adapter.parameters.items() if name not in copied]
    if not all(value.isfinite().all() for value in (*values, *copies.values())):
        raise ZeroliteError(f"adapter {adapter.name!r} holds NaN or Inf: it is not merged")
    batch = _default_batch(model) if batch is None else batch
    with evaluating(model), _only(adapters, adapter.name):
        adapted = _logits(model, batch)
        by_weight = {id(layer.weight): layer for layer in layers.values()}
        for weights in unsharded_parameters(model, [layer.weight for layer in layers.values()], writeback=True):
            for weight in weights:
                layer = by_weight[id(weight)]
                layer.lora[adapter.name].merge_into(layer)
        heads.merge(model, adapter)
        adapter.is_merged = True
        difference = (_logits(model, batch) - adapted).abs().max().double()
    return difference.item() if engine is None else engine.all_gather_scalars(difference.view(1)).max().item()


def check_merge(model: nn.Module, name: str | None = None) -> None:
    """Raise the ValueError that `merge` would, before a training: also on a model on the meta device. Not collective.

    It says nothing of the adapter's values.
    """
    adapter = adapter_of(model, name)
    if not isinstance(adapter.config, LoraConfig):
        raise ValueError(f"adapter {adapter.name!r} is a prompt, which has no place in weights: only LoRA is merged")
    if adapter.is_merged:
        raise ValueError(f"adapter {adapter.name!r} is merged already")
    _refuse_tied(model, layers_of(model, adapter.name))


def _refuse_tied(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    for layer_name, layer in layers.items():
        if owners[id(layer.weight)] > 1:
            raise ValueError(
                f"{layer_name}.weight is tied to another module's, which would change with it: keep the adapter apart, "
                "or untie the weights before it is added"
            )


def _default_batch(model: nn.Module) -> dict[str, Tensor]:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise ValueError(f"merge compares logits: give batch=, what this {type(model).__name__} is called with")
    generator = torch.Generator().manual_seed(0)
    vocabulary = config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(vocabulary, (ROWS, LENGTH), generator=generator).to(next(model.parameters()).device)
    return {"input_ids": ids, **({"decoder_input_ids": ids} if config.is_encoder_decoder else {})}


@torch.no_grad()
def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    output = model(**batch)
    if isinstance(output, Tensor):
        logits = output
    else:  # question answering has two
        logits = output.logits if "logits" in output else torch.stack([output.start_logits, output.end_logits])
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@contextlib.contextmanager
def _only(adapters: Adapters, name: str) -> Iterator[None]:
    """Inside, forwards use the adapter called `name`, whatever is active or disabled outside."""
    before = adapters.active, adapters.num_disabled
    adapters.active, adapters.num_disabled = name, 0
    try:
        yield
    finally:
        adapters.active, adapters.num_disabled = before
