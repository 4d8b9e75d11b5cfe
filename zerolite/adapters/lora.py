"""LoRA, rsLoRA and DoRA: adding an adapter to the linear layers of a model.

An adapter has the dtype of its layer (PEFT's is fp32 on a 16-bit base). zerolite's optimizers step 16-bit adapters on
an fp32 master. torch's optimizers step them in 16 bits, where small updates round to nothing.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from zerolite.adapters import heads
from zerolite.adapters import targets as naming
from zerolite.adapters.config import DEFAULT_TARGETS, LoraConfig
from zerolite.adapters.layers import LoraLayer, LowRank, Together, adapted_class
from zerolite.adapters.state import Adapter, adapters_of, adopt, begin
from zerolite.adapters.walk import unsharded_parameters

# Children of one module that usually read the same tensor.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"))


def add_lora(
    model: nn.Module,
    r: int = 8,
    alpha: float = 16,
    dropout: float = 0.05,
    targets: str | Iterable[str] = DEFAULT_TARGETS,
    *,
    use_rslora: bool = False,
    use_dora: bool = False,
    modules_to_save: Iterable[str] | None = None,
    name: str = "default",
) -> nn.Module:
    """Add a LoRA adapter to a model, in place; returns the model. The base is frozen, only this adapter trains.

    A model for classification or question answering has a head that is new: the adapter has a copy of it, which trains
    whole and is saved with the adapter, as PEFT's.

    W x becomes W x + scale B A dropout(x) with A (r, K), B (N, r) and scale = alpha / r (Hu et al. 2021, arXiv
    2106.09685). B starts as zeros, so the model computes what it did before.
    targets: names of layers, or ends of names after a dot. Default, also when given in full: the attention's Q, K and V
        projections, or the fused projection of a model that has one; of the language model alone where the model reads
        images or sound. A string is a regular expression for whole names, or "all-linear":
        every linear layer but the output head and `modules_to_save`.
    use_rslora: scale = alpha / sqrt(r).
    use_dora: W's magnitude, a parameter (N,), and its direction train separately (Liu et al. 2024, arXiv 2402.09353).
    modules_to_save: names of modules, or ends of names, that the adapter trains whole, in copies of its own. None: the
        head of a classifier of transformers. (): nothing. Elsewhere what is outside of the base model is warned of.
    name: of the adapter. A model can have several; `use` chooses one, `disabled` switches them off.

    Call it before `zerolite.shard`, on every rank alike. Each rank draws values from torch's default generator; `shard`
    broadcasts rank 0's. On a base without values (meta device) the adapter lies on the CPU, and `shard` or
    `load_pretrained` computes DoRA's magnitudes. Reentrant activation checkpointing gives no gradients where no input
    requires one: call `model.enable_input_require_grads()` with it.
    Raises ValueError for an argument out of range, for targets that match no layer or a layer that cannot have LoRA,
    for modules that cannot train whole (embeddings, tied weights, buffers), for a name that is taken or no identifier,
    and for a sharded model.
    """
    ends, modules = heads.find(model, modules_to_save)
    targets, layers = naming.find(model, targets, modules)
    attach(model, name, LoraConfig(r, alpha, dropout, targets, use_rslora, use_dora, ends), layers, modules)
    return model


def attach(
    model: nn.Module,
    name: str,
    config: LoraConfig,
    layers: Mapping[str, nn.Module],
    modules: Mapping[str, nn.Module],
) -> Adapter:
    """Put a new adapter on `layers`, with copies of `modules`, both by name. ValueError where one cannot have it."""
    for layer_name, layer in layers.items():
        _check(layer_name, layer)
    if hasattr(nn.ModuleDict, name):
        raise ValueError(f"an adapter cannot be called {name!r}: torch.nn.ModuleDict has a method of that name")
    heads.check(model, modules)
    adapter = begin(model, name, config, compute_initial_values)
    for layer_name, layer in layers.items():
        if not isinstance(layer, LoraLayer):
            layer.__class__ = adapted_class(layer.__class__)
            layer.adapters = adapters_of(model)
            layer.lora = nn.ModuleDict()
        r, scale = config.rank_of(layer_name), config.scale_of(layer_name)
        layer.lora[name] = LowRank(layer, r, scale, float(config.dropout), config.use_dora)
    heads.attach(model, adapter, modules)
    adopt(model, adapter)
    if not config.use_dora:
        _put_together(model, name, layers)
    return adapter


def _check(layer_name: str, layer: nn.Module) -> None:
    """ValueError for a layer that would compute without the adapter, or with a wrong one."""
    kind = type(layer).__name__
    if "forward" in vars(layer):
        raise ValueError(
            f"{layer_name} has a forward of its own on the instance, which would pass the adapter over "
            "(accelerate's dispatch does that): add the adapter before"
        )
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise ValueError(f"{layer_name} is part of torch.nn.MultiheadAttention, which reads its weight directly")
    if not layer.weight.is_floating_point() or layer.weight.ndim != 2:
        raise ValueError(
            f"{layer_name} ({kind}) has no plain weight matrix but {layer.weight.dtype}: load the base unquantised"
        )


def _put_together(model: nn.Module, name: str, layers: Mapping[str, nn.Module]) -> None:
    """Join layers that read one input, so that the kernels read it once."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return  # in cross-attention Q reads another input than K and V
    parents: dict[str, dict[str, nn.Module]] = defaultdict(dict)
    for layer_name, layer in layers.items():
        parent, _, end = layer_name.rpartition(".")
        parents[parent][end] = layer
    for parent, children in parents.items():
        module = model.get_submodule(parent)
        if hasattr(module, "gradient_checkpointing"):
            continue  # checkpointing recomputes its forward without the hooks that `Together` needs
        for names in SIBLINGS:
            alike: dict[tuple, list[nn.Module]] = defaultdict(list)
            for layer in (children[end] for end in names if end in children):
                low_rank = layer.lora[name]
                alike[(*low_rank.lora_A.shape, low_rank.scale)].append(layer)
            for group in alike.values():
                if len(group) > 1:
                    Together(module, group, name)


def layers_of(model: nn.Module, name: str) -> dict[str, LoraLayer]:
    """The layers that have the adapter called `name`, by their names in the model."""
    return {key: m for key, m in model.named_modules() if isinstance(m, LoraLayer) and name in m.lora}


@torch.no_grad()
def compute_initial_values(model: nn.Module) -> None:
    """Compute DoRA's missing magnitudes, the norms of W's rows, and copy heads. Collective if sharded.

    A magnitude is missing, and NaN, where the adapter was added before the base had values. Called once the base has
    them, before the first forward. On a sharded model one unit is gathered at a time.
    """
    waiting = {
        low_rank: layer
        for layer in model.modules()
        if isinstance(layer, LoraLayer)
        for low_rank in layer.lora.values()
        if low_rank.is_magnitude_missing
    }
    norms: dict[nn.Parameter, torch.Tensor] = {}  # by magnitude
    for weights in unsharded_parameters(model, [layer.weight for layer in waiting.values()], writeback=False):
        here = {id(weight) for weight in weights}
        for low_rank, layer in waiting.items():
            if id(layer.weight) in here:
                norms[low_rank.magnitude] = low_rank.row_norms(layer)
                low_rank.is_magnitude_missing = False
    for magnitudes in unsharded_parameters(model, norms, writeback=True):
        for magnitude in magnitudes:
            magnitude.copy_(norms[magnitude])
    heads.copy_missing_values(model)
