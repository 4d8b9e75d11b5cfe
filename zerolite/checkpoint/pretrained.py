"""Load a Hugging Face folder into a sharded model: each rank reads its own slices of the safetensors."""

import warnings
from collections.abc import Callable
from pathlib import Path

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from zerolite.checkpoint.empty_model import empty_model
from zerolite.checkpoint.weight_files import Weights
from zerolite.config import Offload, Precision
from zerolite.engine import build, meta_init
from zerolite.engine.engine import Engine
from zerolite.runtime import device as devices
from zerolite.runtime.mesh import mesh_of
from zerolite.shards.bucket import Bucket
from zerolite.shards.layout import Partition
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

    path: the folder. No rank builds the whole model: each reads its own ranges, and where unsharded parameters stay
        (stages 0 to 2) ranks gather the rest from each other.
    adapt: called with the model before it is sharded, its parameters on the meta device, to freeze some or to add
        adapters: `adapt=zerolite.adapters.add_lora`.
    stage, mesh, offload, precision, units: as of `shard`.

    A warning names weights of the folder that have no place in the model. Raises ValueError where the folder has no
    config.json or no weights, misses a file, is damaged, has other weights than the configuration asks for, or needs
    Python code of its own (`auto_map`), which is never run. Raises what `shard` raises for the other arguments.
    """
    offload = build.check_arguments(stage, offload, precision)
    folder = Path(path)
    with Weights(folder) as weights:
        model = empty_model(folder, weights)
        if adapt is not None:
            adapt(model)
        device = devices.target(model, mesh)
        engine = Engine(model, Partition(stage), mesh_of(mesh, device), device, precision)
        build.build(engine, units, offload, meta_init.leave_meta, has_values=False)
        _fill(engine, weights)
        for name, buffer in model.named_buffers():
            if name in weights.entries:
                weights.read(name, 0, buffer.numel(), buffer.data.view(-1))
    build.finish(engine)
    return model.eval()


def _fill(engine: Engine, weights: Weights) -> None:
    """Read this rank's shards, and gather the others' where unsharded parameters stay. Collective."""
    keys = _keys_of(engine, weights)
    for bucket in _without_values(engine):
        shard, spec = bucket.shard, bucket.shard.spec
        values = shard.values()
        for slot in bucket.layout.slots:
            part = slot.range.intersect(spec.shard_range)
            weights.read(keys[slot.name], *part.relative_to(slot.range), part.of(values, shard.range))
        if spec.owns_all:
            everything = values.to(engine.device.device)
            own = spec.shard_range.of(everything)
            engine.mesh.shard.all_gather(everything, own, f"gathering {bucket.layout.name}").wait()
            values = everything.to(values.device)
        shard.set_values(values)
        shard.publish()
        bucket.parameters.wait()


def _without_values(engine: Engine) -> list[Bucket]:
    """Buckets whose parameters were on the meta device when the model was sharded."""
    return [bucket for unit in engine.units for bucket in unit.buckets if bucket.group.is_on_meta]


def _keys_of(engine: Engine, weights: Weights) -> dict[str, str]:
    """Parameter name -> name in the files: its own or a tied one's, with or without the base model's prefix."""
    model = engine.model
    prefix = getattr(model, "base_model_prefix", "")
    aliases: dict[str, list[str]] = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for alias, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(names[id(parameter)], []).append(alias)
    keys: dict[str, str] = {}
    for slot in [slot for bucket in _without_values(engine) for slot in bucket.layout.slots]:
        names_here = aliases[slot.name]
        candidates = [*names_here, *(f"{prefix}.{name}" for name in names_here)]
        candidates += [name.removeprefix(f"{prefix}.") for name in names_here]
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
