"""Methods of the user's model that would be wrong on sharded state: made right, or refused by name."""

import functools
import types
from collections.abc import Callable

import torch
from torch import nn

from zerolite.engine import copies
from zerolite.engine.distributed import apply_to_others
from zerolite.engine.engine import Engine, info_of
from zerolite.engine.foreign_trainers import refuse_accelerate
from zerolite.engine.parameter_guard import guard_apply
from zerolite.errors import ZeroliteError


def adapt(engine: Engine) -> None:
    """Replace on the engine's model what needs it."""
    model = engine.model
    own_zero_grad = model.zero_grad

    @functools.wraps(own_zero_grad)
    def zero_grad(set_to_none: bool = True) -> None:
        # torch's own asks for model.parameters(), which would wait for the workers; no gradient lives in them.
        engine.clear_gradients(set_to_none)

    model.zero_grad = zero_grad

    def dtypes() -> dict[torch.dtype, str]:
        buckets = (bucket for unit in engine.units for bucket in unit.buckets)
        return {bucket.shard.spec.dtype: bucket.layout.slots[0].name for bucket in buckets}

    if engine.has_dtensors:
        model._apply = functools.partial(apply_to_others, model, engine.device.device)
    guard_apply(model, engine.guard, dtypes, lambda: copies.expect_whole(engine, model, "a change of all values"))
    copies.adapt(engine)
    refuse_accelerate(model)
    _read_parts(engine)
    if engine.fetch_queue.shards:
        _fetch_when_read(engine)
    if all(bucket.parameters.stays_unsharded for unit in engine.units for bucket in unit.buckets):
        # What was loaded must reach the master, wherever it lies; else the next step would undo it.
        model.register_load_state_dict_post_hook(lambda module, keys: engine.absorb_edits())
        return
    if hasattr(model, "generate"):
        _generate_together(engine)

    def refuse(module: nn.Module, *args) -> None:
        if engine.full_depth == 0:
            raise ZeroliteError(
                "state dicts of a model at stage 3 hold no whole parameters: use zerolite.save, zerolite.export, "
                "or call it inside `with zerolite.full_params(model, writeback=...)` on every rank"
            )

    model.register_state_dict_pre_hook(refuse)
    model.register_load_state_dict_pre_hook(refuse)


def _read_parts(engine: Engine) -> None:
    """State dicts of a part of the model, as of the whole, have values or are refused: owners of parameters ask."""

    def expect_values(module: nn.Module, *args) -> None:
        if any(info_of(parameter) is not None for parameter in module._parameters.values() if parameter is not None):
            copies.expect_whole(engine, module, "a state dict")

    for module in engine.model.modules():
        if module is not engine.model and module._parameters:
            module.register_state_dict_pre_hook(expect_values)
            module.register_load_state_dict_pre_hook(expect_values)


def _generate_together(engine: Engine) -> None:
    """Ranks that finish early go on forwarding, so that every rank gathers as often as the longest one.

    With whole parameters nothing is gathered, and one rank may generate while the others do not. Else a caller's
    synced_gpus=False (Seq2SeqTrainer always says so) would leave ranks waiting for those that have finished.
    """
    own_generate: Callable = engine.model.generate

    @functools.wraps(own_generate)
    def generate(*args, **kwargs):
        if engine.full_depth == 0:
            kwargs["synced_gpus"] = True
        else:
            kwargs.setdefault("synced_gpus", False)
        return own_generate(*args, **kwargs)

    engine.model.generate = generate


def _fetch_when_read(engine: Engine) -> None:
    """Whoever asks the model for parameters gets those that the workers have stepped."""
    model = engine.model
    own_parameters = model.named_parameters

    @functools.wraps(own_parameters)
    def named_parameters(self: nn.Module, *args, **kwargs):
        for name, parameter in own_parameters(*args, **kwargs):
            info = info_of(parameter)  # none for one that was added later
            if info is not None:
                engine.fetch(info.bucket.unit)
            yield name, parameter

    def fetch(module: nn.Module, *args) -> None:
        engine.fetch()

    # model.parameters() asks this one, and torch.compile whether it is a method.
    model.named_parameters = types.MethodType(named_parameters, model)
    model.register_state_dict_pre_hook(fetch)
    model.register_load_state_dict_pre_hook(fetch)
