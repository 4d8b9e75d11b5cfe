"""Reading and editing parameters of a model in place, whether it is sharded or not."""

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from zerolite.engine.engine import find_engine, info_of
from zerolite.engine.prefetch import unsharded_buckets


@torch.no_grad()
def unsharded_parameters(
    model: nn.Module, parameters: Iterable[nn.Parameter], *, writeback: bool
) -> Iterator[list[nn.Parameter]]:
    """Yield those of `parameters` that are readable now: bucket by bucket, or all at once where nothing is sharded.

    writeback: what is written into them before the next turn is kept: on a sharded model it reaches this rank's shard
        and the master. Every rank must write the same.
    At stage 3 one unit is gathered at a time. Collective. Raises WorkerError where a worker failed.
    """
    parameters = list(parameters)
    engine = find_engine(model)
    if engine is None:
        yield parameters
        return
    wanted = {id(parameter) for parameter in parameters}
    infos = [info for info in map(info_of, parameters) if info is not None]
    for bucket in unsharded_buckets(engine, {info.bucket for info in infos}, writeback=writeback):
        yield [parameter for parameter in bucket.parameters.tensors if id(parameter) in wanted]
