"""What of a model and its optimizer is saved, and under which key."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from zerolite.engine.engine import Engine
from zerolite.optim.base import ShardedOptimizer
from zerolite.shards.bucket import Bucket
from zerolite.shards.layout import Range, Slot


class Entry(NamedTuple):
    """One kind of values of one bucket: the parameters, or one optimizer state; this rank's range of them."""

    bucket: Bucket
    kind: str  # "parameter" or a state's name
    slots: list[Slot]  # that have it
    read: Callable[[], torch.Tensor]  # 1D, the range; waits for the workers, and decodes what they encode
    write: Callable[[torch.Tensor], None]  # stores what `read` gave and somebody changed


class Slice(NamedTuple):
    """Part of one parameter, or of one state of it, that this rank saves."""

    key: str  # "<kind>/<parameter>"
    slot: Slot
    elements: Range  # of the slot
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]  # 1D


def entries_of(engine: Engine, optimizer: ShardedOptimizer | None, frozen: bool) -> Iterator[Entry]:
    for unit in engine.units:
        for bucket in unit.buckets:
            if bucket.gradients is None and not frozen:
                continue
            shard = bucket.shard
            yield Entry(bucket, "parameter", list(bucket.layout.slots), shard.values, shard.set_values)
            if optimizer is None:
                continue
            stepped = [slot for slot, parameter in bucket.slots() if optimizer.is_stepped(parameter)]
            for kind in optimizer.rule.state_names if stepped else ():
                read, write = partial(optimizer.read_state, bucket, kind), partial(optimizer.write_state, bucket, kind)
                yield Entry(bucket, kind, stepped, read, write)


def slices_of(engine: Engine, optimizer: ShardedOptimizer | None, frozen: bool) -> Iterator[Slice]:
    """Everything that this rank is the one to save: its shard, also where it owns all."""
    if engine.mesh.replicas.rank != 0:
        return
    names = saved_names(engine)
    for bucket, kind, slots, read, _ in entries_of(engine, optimizer, frozen):
        if any(one.group.rank != 0 and not one.splits(bucket.group.splits) for one in engine.mesh.tensor):
            continue  # the first rank of tensor parallelism saves what all have whole
        spec = bucket.shard.spec
        parts = [(slot, slot.range.intersect(spec.shard_range)) for slot in slots]
        parts = [(slot, part) for slot, part in parts if part.numel > 0]
        read_part = _read_once(read, spec.range, len(parts))
        for slot, part in parts:
            elements = part.relative_to(slot.range)
            yield Slice(f"{kind}/{names[slot.name]}", slot, elements, spec.stepped_dtype, partial(read_part, part))


def _read_once(read: Callable[[], torch.Tensor], owned: Range, num_parts: int) -> Callable[[Range], torch.Tensor]:
    """Read parts of what `read()` gives: it is decoded with the first, and dropped with the last of `num_parts`."""
    values: list[torch.Tensor] = []
    parts_left = num_parts

    def read_part(part: Range) -> torch.Tensor:
        nonlocal parts_left
        if not values:
            values.append(read())
        found = part.of(values[0], owned)
        parts_left -= 1
        if parts_left == 0:
            values.clear()
        return found

    return read_part


def buffers_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's persistent buffers, those that a state dict holds."""
    return {
        name: buffer
        for name, buffer in model.named_buffers()
        if name.rpartition(".")[2] not in model.get_submodule(name.rpartition(".")[0])._non_persistent_buffers_set
    }


def slots_of(engine: Engine) -> list[Slot]:
    return [slot for unit in engine.units for bucket in unit.buckets for slot in bucket.layout.slots]


def saved_names(engine: Engine) -> dict[str, str]:
    """Parameters and buffers, by their names in the model, as a checkpoint has them.

    Several pipeline stages of one rank are in a list, whose numbers are of this rank alone: names go without them.
    """
    own = [*(slot.name for slot in slots_of(engine)), *buffers_of(engine.model)]
    if not (engine.mesh.pipeline and isinstance(engine.model, nn.ModuleList)):
        return {name: name for name in own}
    return {name: name.partition(".")[2] for name in own}
