"""Reading and editing parameters of a model in place, whether it is sharded or not."""

from collections.abc import Iterable, Iterator

import torch
from torch import nn


@torch.no_grad()
def in_turn(model: nn.Module, parameters: Iterable[nn.Parameter], *, edits: bool) -> Iterator[list[nn.Parameter]]:
    """Yield those of `parameters` that are whole now: unit by unit, or all at once where nothing is sharded.

    edits: what is written into them before the next turn is kept: on a sharded model it reaches the owned range and
        the master. Every rank must write the same.
    At stage 3 one unit is gathered at a time. Collective.
    """
    parameters = list(parameters)
    zero = getattr(model, "_zerolite", None)
    if zero is None:
        yield parameters
        return
    wanted = {id(parameter) for parameter in parameters}
    zero.settle()
    for unit in zero.units:
        buckets = [bucket for bucket in unit.buckets if any(id(p) in wanted for p in bucket.flat.parameters)]
        if not buckets:
            continue
        unit.unshard()
        unit.wait()
        try:
            yield [p for bucket in buckets for p in bucket.flat.parameters if id(p) in wanted]
            for bucket in buckets if edits else ():
                bucket.flat.absorb_edits()
        finally:
            if zero.full_depth == 0:
                unit.reshard()
