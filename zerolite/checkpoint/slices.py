"""What of a model and its optimizer is saved, and under which key."""

from functools import partial

import torch
from torch import nn

from zerolite.engine.engine import Zero
from zerolite.optim.base import ShardedOptimizer


def flats_of(zero: Zero, optimizer: ShardedOptimizer | None, frozen: bool):
    """(bucket, kind, read, the slots that have it) of parameters and of every state; see `put_back`.

    `read()` gives this rank's 1D range; where the host encodes it, it is decoded then, after waiting for the workers.
    """
    for unit in zero.units:
        for bucket in unit.buckets:
            if bucket.gradients is None and not frozen:
                continue
            slots = list(zip(bucket.layout.slots, bucket.flat.parameters, strict=True))
            yield bucket, "parameter", bucket.flat.values, [slot for slot, _ in slots]
            stepped = [slot for slot, parameter in slots if optimizer is not None and parameter in optimizer.state]
            for kind in optimizer.rule.state_names if stepped else ():
                yield bucket, kind, partial(optimizer.read_state, bucket, kind), stepped


def put_back(optimizer: ShardedOptimizer | None, bucket, kind: str, values: torch.Tensor) -> None:
    if kind == "parameter":
        bucket.flat.set_values(values)
    else:
        optimizer.write_state(bucket, kind, values)


def slices_of(zero: Zero, optimizer: ShardedOptimizer | None, frozen: bool):
    """(key, start, stop, dtype, read) of everything that this rank is the one to save; `read()` gives 1D values."""
    if zero.replicate_group.rank != 0:
        return
    for bucket, kind, read, slots in flats_of(zero, optimizer, frozen):
        flat = bucket.flat
        low, high = bucket.layout.piece(zero.shard_group.rank)  # its piece, also where it owns all
        held: list[torch.Tensor] = []  # decoded once for all slots, and dropped with the last
        here = [(slot, *bucket.layout.overlap(slot, low, high)) for slot in slots]
        here = [(slot, first, last) for slot, first, last in here if first < last]
        for slot, first, last in here:

            def read_slot(read=read, held=held, flat=flat, first=first, last=last, is_last=slot is here[-1][0]):
                if not held:
                    held.append(read())
                values = held[0][first - flat.start : last - flat.start]
                if is_last:
                    held.clear()
                return values

            yield f"{kind}/{slot.name}", first - slot.offset, last - slot.offset, flat.stepped_dtype, read_slot


def buffers_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's persistent buffers, those that a state dict holds."""
    return {
        name: buffer
        for name, buffer in model.named_buffers()
        if name.rpartition(".")[2] not in model.get_submodule(name.rpartition(".")[0])._non_persistent_buffers_set
    }


def shapes_of(zero: Zero) -> dict[str, dict[str, list[int]]]:
    slots = [slot for unit in zero.units for bucket in unit.buckets for slot in bucket.layout.slots]
    return {
        "parameters": {slot.name: list(slot.shape) for slot in slots},
        "buffers": {name: list(buffer.shape) for name, buffer in buffers_of(zero.model).items()},
    }
