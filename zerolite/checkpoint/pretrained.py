"""Load a Hugging Face folder into a sharded model: each rank reads its own slices of the safetensors."""

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from zerolite.adapters.initial import settle_initial_values
from zerolite.api import build, check_arguments, settle_buffers
from zerolite.checkpoint.weight_files import Weights
from zerolite.config import Offload, Precision
from zerolite.engine import meta_init as meta
from zerolite.engine.engine import Zero
from zerolite.runtime.mesh import groups_of
from zerolite.shards.units import UnitRule


def load_pretrained(
    path,
    stage: int,
    mesh: DeviceMesh | None = None,
    offload: Offload | str | None = None,
    precision: Precision | None = None,
    units: UnitRule | None = None,
    adapt: Callable[[nn.Module], object] | None = None,
) -> nn.Module:
    """Build a sharded model, in eval mode, from a local Hugging Face folder with safetensors. Collective.

    Arguments as of `shard`. adapt: called with the model before it is sharded, its parameters on the meta device, to
    freeze some or to add adapters: `adapt=zerolite.adapters.add_lora`. No rank builds the whole model: each reads its
    own ranges, and where full parameters stay (stages 0 to 2) ranks gather the rest from each other. ValueError where
    the folder has no weights, or others than the configuration asks for.
    """
    offload = check_arguments(stage, offload, precision)
    folder = Path(path)
    with Weights(folder) as weights:
        model = _empty_model(folder)
        if adapt is not None:
            adapt(model)
        device = meta.target_device(model, mesh)
        zero = Zero(model, stage, *groups_of(mesh, device), device, precision)
        build(zero, units, offload, meta.leave_meta, has_values=False)
        _fill(zero, weights)
        for name, buffer in model.named_buffers():
            if name in weights.entries:
                weights.read(name, 0, buffer.numel(), buffer.data.view(-1))
    settle_buffers(zero)
    settle_initial_values(model)
    return model.eval()


def _empty_model(folder: Path) -> nn.Module:
    config = transformers.AutoConfig.from_pretrained(folder)
    architectures = config.architectures or []
    cls = getattr(transformers, architectures[0], None) if architectures else None
    dtype = config.dtype or torch.float32

    def make() -> nn.Module:
        if cls is not None:
            return cls._from_config(config, dtype=dtype)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)

    model = meta.parameters_on_meta(make)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


def _fill(zero: Zero, weights: Weights) -> None:
    """Read this rank's ranges, and gather the others' where full parameters stay. Collective."""
    keys = _keys_of(zero, weights)
    for unit in zero.units:
        for bucket in filter(lambda bucket: bucket.was_on_meta, unit.buckets):
            flat = bucket.flat
            low, high = bucket.layout.piece(zero.shard_group.rank)
            values = flat.values()
            mine = values[low - flat.start : high - flat.start]
            for slot in bucket.layout.slots:
                first, last = bucket.layout.overlap(slot, low, high)
                weights.read(keys[slot.name], first - slot.offset, last - slot.offset, mine[first - low : last - low])
            if flat.owns_all:
                everything = values.to(zero.device.device)
                zero.shard_group.all_gather(everything, everything[low:high], flat.label).wait()
                values = everything.to(values.device)
            flat.set_values(values)
            flat.republish()
            flat.wait()


def _keys_of(zero: Zero, weights: Weights) -> dict[str, str]:
    """Parameter name -> name in the files: its own or a tied one's, with or without the base model's prefix."""
    model = zero.model
    prefix = getattr(model, "base_model_prefix", "")
    aliases: dict[str, list[str]] = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for alias, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(names[id(parameter)], []).append(alias)
    keys: dict[str, str] = {}
    for unit in zero.units:
        for bucket in filter(lambda bucket: bucket.was_on_meta, unit.buckets):
            for slot in bucket.layout.slots:
                names = aliases[slot.name]
                candidates = [*names, *(f"{prefix}.{name}" for name in names)]
                candidates += [name.removeprefix(f"{prefix}.") for name in names]
                key = next((candidate for candidate in candidates if candidate in weights.entries), None)
                if key is None:
                    raise ValueError(
                        f"{weights.folder} holds no weights for {slot.name}: they are of another model than "
                        "config.json tells, or transformers converts them on load; then build the model with "
                        "from_pretrained and give it to zerolite.shard"
                    )
                if weights.shape(key) != slot.shape:
                    raise ValueError(
                        f"{key} in {weights.folder} has shape {weights.shape(key)}, config.json asks for {slot.shape}"
                    )
                keys[slot.name] = key
    known = {*keys.values(), *(alias for group in aliases.values() for alias in group), *dict(model.named_buffers())}
    unused = sorted(set(weights.entries) - known - {f"{prefix}.{name}" for name in known})
    if unused:
        warnings.warn(f"{weights.folder}: weights without a place: {', '.join(unused[:8])}", stacklevel=3)
    return keys
