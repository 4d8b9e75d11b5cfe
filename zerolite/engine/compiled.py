"""Units whose forward is compiled by torch, with the hooks outside.

[Note: what is compiled]
A unit's hooks gather, free and reduce, and collectives are no graph. `Module.__call__` runs them around
`module.forward`, so that alone is compiled: one graph, which reads the gathered buffers as it reads any parameter.
Their storage is resized and never replaced, and no guard asks for its size: nothing is compiled again at stage 3.
Units of one class share what is compiled, as long as their attributes are alike.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch._dynamo
from torch import nn

from zerolite.engine.engine import Engine
from zerolite.engine.hooks import entrances
from zerolite.shards.bucket import Unit

COMPILED = "_torchdynamo_orig_callable"  # of what torch.compile returns for a function
CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")
RECOMPILATIONS = 8  # of one unit, beside those of the others of its class: torch's own default for one function


def compile_units(engine: Engine, options: Mapping[str, Any]) -> None:
    """Compile the forward of every unit that contains no other. ValueError where a graph would have to break."""
    _refuse_cuda_graphs(engine, options)
    owner = {id(module): unit for unit in engine.units for module in entrances(unit)}
    chosen = []
    for unit in engine.units:
        inner = [owner[id(m)] for m in unit.module.modules() if m is not unit.module and id(m) in owner]
        if not inner:
            chosen.append(unit)
        elif not unit.is_root and all(other.is_root for other in inner):
            raise ValueError(_is_shared(engine, unit))
    if not chosen:
        raise ValueError(
            f"{type(engine.model).__name__} has no unit but itself, whose forward would be cut at every layer: shard "
            "it with units= the class of its layers, or call torch.compile(model), which cuts there"
        )
    config = torch._dynamo.config  # one count for all units of a class, which may differ by a number: layer_idx
    config.recompile_limit = max(config.recompile_limit, RECOMPILATIONS + len(chosen))
    for unit in chosen:
        unit.module.forward = torch.compile(unit.module.forward, **options)


def _refuse_cuda_graphs(engine: Engine, options: Mapping[str, Any]) -> None:
    """They read a parameter at the address where it lay when they were recorded; stage 3 gathers it anew."""
    records = options.get("mode") in CUDA_GRAPH_MODES or (options.get("options") or {}).get("triton.cudagraphs")
    if records and not all(bucket.parameters.stays_unsharded for unit in engine.units for bucket in unit.buckets):
        raise ValueError(
            "this mode of torch.compile records CUDA graphs, which read parameters where they lay before, and stage 3 "
            'gathers them anew: use mode="max-autotune-no-cudagraphs" or "default", or stage=2'
        )


def compiled_forwards(model: nn.Module) -> Iterator[nn.Module]:
    """The modules whose own forward stands before their class's, compiled: a copy would call the original."""
    for module in model.modules():
        if hasattr(module.__dict__.get("forward"), COMPILED):
            yield module


def _is_shared(engine: Engine, unit: Unit) -> str:
    mine = {id(parameter) for parameter in unit.module.parameters()}
    names = [
        slot.name for bucket in engine.units[0].buckets for slot, parameter in bucket.slots() if id(parameter) in mine
    ]
    return (
        f"{names[0]} belongs to {unit.name} and to another unit, so it is gathered inside the forward of {unit.name}, "
        "where its graph would have to break: shard with units= a class that holds all that share it, or call "
        "torch.compile(model), which breaks there"
    )
