"""What every trainer asks for: a model sharded on the trainer's device, torch's optimizer on it, whole values of it."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

import zerolite
from zerolite.engine import build
from zerolite.engine.engine import Engine, engine_of, find_engine, info_of
from zerolite.optim.base import ShardedOptimizer
from zerolite.optim.like import like
from zerolite.shards.layout import Partition

ARGUMENTS = ("stage", "offload", "precision", "units", "mesh")
DEFAULT_STAGE = 2  # of a strategy
_DEVICE_BUFFER = "_zerolite_device"


def shard_arguments(zero: Mapping[str, Any]) -> dict[str, Any]:
    """`zero=dict(stage=3, offload="cpu")` as arguments of `zerolite.shard`.

    TypeError for what is no mapping, or has other keys; TypeError and ValueError as of `zerolite.shard`.
    """
    if not isinstance(zero, Mapping):
        raise TypeError(f"zero= takes the arguments of zerolite.shard, as dict(stage=3), got {type(zero).__name__}")
    unknown = sorted(zero.keys() - set(ARGUMENTS))
    if unknown or {"stage"} - zero.keys():
        raise TypeError(
            f"zero= takes stage and, where wanted, {', '.join(ARGUMENTS[1:])}, as zerolite.shard does; "
            f"got {', '.join(map(str, zero)) or 'nothing'}"
        )
    build.check_arguments(zero["stage"], zero.get("offload"), zero.get("precision"))
    return dict(zero)


def check_options(strategy: str, options: Collection[str], known: Collection[str]) -> None:
    """TypeError for what a strategy of Lightning or Fabric has not."""
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(
            f"{strategy} got {', '.join(unknown)}, which it has not: it takes stage, offload, precision, units and "
            f"{', '.join(sorted(known))}"
        )


def uncompiled(model: nn.Module) -> nn.Module:
    """What torch.compile has wrapped, or the model itself."""
    return getattr(model, "_orig_mod", model)


def shard_on(model: nn.Module, device: torch.device, world_size: int, arguments: Mapping[str, Any]) -> Engine:
    """Shard a model on the device that a trainer moves batches to; one that is sharded already stays. Collective.

    world_size: how many processes the trainer divides its batches among.
    ValueError for a model that is sharded at another stage, or lies on another device, for another number of processes,
    and as of `zerolite.shard`.
    """
    partition, model = Partition(arguments["stage"]), uncompiled(model)
    engine = find_engine(model)
    marker = torch.zeros(1, device=device)
    device = marker.device  # with the number of a GPU, which trainers leave out
    if engine is None:
        # A model of the host goes where any of its tensors lies; moved whole, it might not fit there.
        model.register_buffer(_DEVICE_BUFFER, marker, persistent=False)
        try:
            zerolite.shard(model, **arguments)
        finally:
            delattr(model, _DEVICE_BUFFER)
        engine = engine_of(model)
    if engine.partition != partition:
        raise ValueError(
            f"the model is sharded as {engine.partition} already, and {partition} was asked for: build it anew"
        )
    if engine.device.device != device:
        raise ValueError(
            f"the trainer moves batches to {device} and the model is sharded on {engine.device.device}: start it on "
            'that device, or hide GPUs that it shall not use (CUDA_VISIBLE_DEVICES="")'
        )
    if engine.mesh.world_size != world_size:
        raise ValueError(
            f"the trainer counts {world_size} processes and torch.distributed {engine.mesh.world_size}, so it would "
            "not divide batches among all: say how many there are (devices= and num_nodes= of Lightning; for "
            "Accelerate on CPUs Accelerator(cpu=True))"
        )
    return engine


def check_scaler(engine: Engine, scaler: torch.amp.GradScaler | None) -> None:
    """ValueError where the trainer and the engine would both scale the loss."""
    if scaler is not None and engine.loss_scale is not None:
        raise ValueError(
            "Precision(torch.float16) scales the loss itself, and the trainer's fp16 would scale it again: keep one of "
            "them"
        )


def sharded_optimizer(optimizer: torch.optim.Optimizer, way_out: str) -> ShardedOptimizer:
    """zerolite's optimizer for one that a user has built, as `zerolite.like`; zerolite's own is returned.

    way_out: what to do where the optimizer's model is not sharded.
    ValueError for an optimizer of no sharded model; TypeError and ValueError as of `zerolite.like`.
    """
    if isinstance(optimizer, ShardedOptimizer):
        return optimizer
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if info_of(parameter) is None:
                raise ValueError(
                    f"param group {index} of this {type(optimizer).__name__} has a parameter of shape "
                    f"{tuple(parameter.shape)} that is of no sharded model: {way_out}"
                )
    return like(optimizer)


def engine_stepped_by(optimizer: ShardedOptimizer) -> Engine | None:
    """The engine of an optimizer's parameters; None where it has none."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            info = info_of(parameter)
            if info is not None:
                return info.engine
    return None


@torch.no_grad()
def gather_state_dict(model: nn.Module) -> dict[str, Any]:
    """The model's state dict with whole values in host memory on rank 0, empty on other ranks. Collective.

    One unit is gathered at a time. The model's own hooks on state dicts run, with the whole values.
    """
    engine = engine_of(model)
    engine.guard.check()
    is_writer = engine.mesh.rank == 0
    whole: dict[int, torch.Tensor] = {}  # by id of the parameter
    for unit in engine.units:
        engine.unshard(unit)
        unit.wait()
        if is_writer:
            for bucket in unit.buckets:
                for parameter in bucket.parameters.tensors:
                    whole[id(parameter)] = parameter.detach().to("cpu", copy=True)
        engine.free(unit)
    if not is_writer:
        return {}
    named = model.named_parameters(prefix="model", remove_duplicate=False)
    values = {name: whole[id(parameter)] for name, parameter in named if id(parameter) in whole}
    engine.full_depth += 1  # what is read below is whole
    try:
        state: dict[str, Any] = functional_call(_StateDict(model), values, ())
    finally:
        engine.full_depth -= 1
    return {key: value.cpu() if isinstance(value, torch.Tensor) else value for key, value in state.items()}


class _StateDict(nn.Module):
    """`forward` is the model's `state_dict`, so that `functional_call` can have it read other tensors."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self) -> dict[str, Any]:
        return self.model.state_dict()
