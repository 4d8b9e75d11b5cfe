"""Copies of a sharded model: plain torch's, whole and without the engine, or refused by name.

`copy.deepcopy(model)`, `torch.optim.swa_utils.AveragedModel(model)`, pickling and `torch.save(model)` give a plain
model where whole values are on this rank. Such a copy shares nothing with the engine: the hooks and methods that
`shard` put on the model stay behind.
"""

import copy
from collections.abc import Iterator

from torch import nn

from zerolite.engine.compiled import compiled_forwards
from zerolite.engine.engine import Engine
from zerolite.engine.foreign_trainers import ACCELERATE_ATTRIBUTE
from zerolite.errors import ZeroliteError

# What `shard` sets on the model itself; a copy has the class's own.
METHODS = ("zero_grad", "named_parameters", "generate", "_apply", "__deepcopy__", "__reduce_ex__", "_zerolite")
ATTRIBUTES = ("_ddp_params_and_buffers_to_ignore", ACCELERATE_ATTRIBUTE)
HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def adapt(engine: Engine) -> None:
    """Have copies of the engine's model be plain ones."""
    model = engine.model
    model.__deepcopy__ = lambda memo: plain_copy(engine, memo)
    model.__reduce_ex__ = lambda protocol: plain_copy(engine, {}).__reduce_ex__(protocol)
    if engine.partition.shards_parameters:
        model._ddp_params_and_buffers_to_ignore = _RefuseDistributedDataParallel()


def plain_copy(engine: Engine, memo: dict) -> nn.Module:
    """An unsharded copy of the engine's model. ZeroliteError where its values are not on this rank."""
    model = engine.model
    if engine.has_dtensors:
        raise ZeroliteError(
            "a model with DTensor parameters is not copied or pickled: its tensors belong to a mesh of processes; take "
            "state_dict(), or zerolite.save, or zerolite.export, which writes whole tensors"
        )
    expect_whole(engine, model, "a copy of the model")
    own = {name: model.__dict__.pop(name) for name in (*METHODS, *ATTRIBUTES) if name in model.__dict__}
    compiled = [(module, module.__dict__.pop("forward")) for module in [*compiled_forwards(model)]]
    try:
        for module in model.modules():
            for *_, hook in _hooks_of_engine(module):
                memo[id(hook)] = None  # they reach the engine
        twin = copy.deepcopy(model, memo)
    finally:
        model.__dict__.update(own)
        for module, forward in compiled:
            module.forward = forward
    for original, duplicate in zip(model.modules(), twin.modules(), strict=True):
        for hooks, identity, _ in _hooks_of_engine(original):
            getattr(duplicate, hooks).pop(identity, None)
    return twin


def expect_whole(engine: Engine, module: nn.Module, what: str) -> None:
    """Have the parameters of a part of the model be readable; ZeroliteError where other ranks would have to help."""
    engine.guard.check()
    mine = {id(parameter) for parameter in module.parameters()}
    for unit in engine.units:
        for bucket in unit.buckets:
            for slot, parameter in bucket.slots():
                if id(parameter) not in mine or bucket.parameters.is_readable:
                    continue
                if bucket.parameters.stays_unsharded:
                    engine.fetch(unit)  # of what workers stepped
                else:
                    raise ZeroliteError(
                        f"{slot.name} is sharded: at stage 3 {what} has no whole parameters; take it inside `with "
                        "zerolite.full_params(model):` on every rank, or use zerolite.save or zerolite.export"
                    )


def _hooks_of_engine(module: nn.Module) -> Iterator[tuple[str, int, object]]:
    """(the module's dict of hooks, the key in it, the hook) of each that `shard` has put on this module."""
    for hooks in HOOKS:
        for identity, hook in getattr(module, hooks).items():
            inner = getattr(hook, "hook", hook)  # torch wraps some
            if getattr(inner, "__module__", "").startswith("zerolite.engine."):
                yield hooks, identity, hook


class _RefuseDistributedDataParallel:
    """Stands where torch's DistributedDataParallel asks which parameters to leave alone."""

    def __iter__(self):
        raise ZeroliteError(
            "DistributedDataParallel cannot wrap a model at stage 3: it would send and reduce whole parameters, and "
            "zerolite reduces gradients itself; call the sharded model directly"
        )
