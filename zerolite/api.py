"""What users call on a model: shard, no_sync, full_params."""

import contextlib
import functools

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from zerolite.config import Offload, Precision
from zerolite.engine import hooks
from zerolite.engine import meta_init as meta
from zerolite.engine.engine import Zero
from zerolite.errors import ZeroliteError
from zerolite.offload.placement import place
from zerolite.runtime.mesh import groups_of
from zerolite.shards.units import UnitRule, plan_units


def shard(
    model: nn.Module,
    stage: int,
    mesh: DeviceMesh | None = None,
    offload: Offload | str | None = None,
    precision: Precision | None = None,
    units: UnitRule | None = None,
) -> nn.Module:
    """Partition a model's training state over ranks, in place, and return it. Collective.

    stage: 0 nothing is sharded (as DDP), 1 optimizer states, 2 also gradients, 3 also parameters.
    mesh: 1-D (shard) or 2-D (replicate x shard) over all ranks; None: the whole world shards.
    offload: "cpu" or an `Offload`: gradients and optimizer states in host memory, stepped by worker processes.
        `optimizer.step` then returns before they are done; each parameter is back when its unit's next forward, or
        `model.parameters()`, `state_dict`, `full_params`, `save` or `export` asks for it, and reads as NaN before.
    precision: dtypes; None: parameters keep theirs, 16-bit ones are reduced in fp32 and stepped on an fp32 master.
    units: module classes, or a predicate over modules, gathered and freed as one; None: the repeated block class.

    Every rank starts from rank 0's values. Afterwards gradients are the mean over ranks and live in the engine, not in
    `parameter.grad`; optimizers are zerolite's. At stage 3 a parameter reads as NaN outside of forward, backward and
    `full_params`. Requires_grad is what it was here: a unit's trainable and frozen parameters are kept apart.
    """
    offload = check_arguments(stage, offload, precision)
    if not isinstance(model, nn.Module):
        raise TypeError(f"shard takes a torch.nn.Module, got {type(model).__name__}")
    if any(hasattr(parameter, "_zerolite_place") for parameter in model.parameters()):
        raise ValueError("the model, or a part of it, is sharded already: build a new one to shard it in another way")
    device = meta.target_device(model, mesh)
    shard_group, replicate_group = groups_of(mesh, device)
    zero = Zero(model, stage, shard_group, replicate_group, device, precision)
    build(zero, units, offload, meta.materialize, has_values=True)
    settle_buffers(zero)
    if hasattr(model, "_zerolite_adapters"):
        from zerolite.adapters.initial import settle_initial_values  # brings transformers: only where adapters did

        settle_initial_values(model)
    return model


def check_arguments(stage, offload, precision) -> Offload | None:
    """ValueError or TypeError for what cannot be; `offload` as a value."""
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ValueError(f"stage is 0, 1, 2 or 3, got {stage!r}")
    offload = Offload.of(offload)
    if offload is not None and offload.parameters and stage != 3:
        raise ValueError(f"Offload(parameters=True) streams what stage 3 shards, got stage={stage}: use stage=3")
    if precision is not None and not isinstance(precision, Precision):
        raise TypeError(f"precision= takes a zerolite.Precision, got {type(precision).__name__}")
    return offload


def settle_buffers(zero: Zero) -> None:
    """Buffers go to the device, in their own dtype, and start from rank 0's values. Collective."""
    for module in zero.model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer = buffer.to(zero.device.device)
                zero.replicate_group.broadcast(buffer)
                zero.shard_group.broadcast(buffer)


def build(zero: Zero, rule: UnitRule | None, offload: Offload | None, materialize, has_values: bool) -> None:
    """Plan the units, make them flat one after the other, and hook the model. Collective.

    `materialize(model, plans, device)` gives the parameters of one module's plans their values, where `has_values`;
    else it only takes them off the meta device, and buckets are born as zeros, for the caller to fill.
    """
    model, precision = zero.model, zero.precision

    def dtype_of(parameter: nn.Parameter) -> torch.dtype:
        return precision.param if precision is not None and parameter.is_floating_point() else parameter.dtype

    plans = plan_units(model, rule, dtype_of)
    on_host = place(zero, plans, dtype_of, offload) if offload is not None else set()
    done: set[int] = set()
    for index, plan in enumerate(plans):
        if id(plan.module) not in done:
            done.add(id(plan.module))
            materialize(model, [other for other in plans if other.module is plan.module], zero.device.device)
        unit = zero.add_unit(plan, has_values, dtype_of, index in on_host)
        hooks.install(zero, unit, plan)
        for bucket in unit.buckets:
            for index, parameter in enumerate(bucket.flat.parameters):
                parameter._zerolite_place = (zero, bucket, index)
    if precision is not None:
        hooks.cast_inputs(zero, precision.param)
    if zero.loss_scale is not None:
        hooks.scale_loss(zero)
    model._zerolite = zero
    _adapt_methods(model, zero)


def _adapt_methods(model: nn.Module, zero: Zero) -> None:
    """Methods of the model that would be wrong on sharded state: made right, or refused by name."""

    @functools.wraps(model.zero_grad)
    def zero_grad(set_to_none: bool = True) -> None:
        # torch's own asks for model.parameters(), which would wait for the workers; no gradient lives in them.
        zero.clear_gradients(set_to_none)

    model.zero_grad = zero_grad
    if zero.host is not None:
        _wait_when_read(model, zero)
    if not all(bucket.flat.is_resident for unit in zero.units for bucket in unit.buckets):
        if hasattr(model, "generate"):
            generate_alone = model.generate

            @functools.wraps(generate_alone)
            def generate(*args, **kwargs):
                # Ranks that finish early go on forwarding, so that every rank gathers as often as the longest one. With
                # whole parameters nothing is gathered, and one rank may generate while the others do not.
                kwargs.setdefault("synced_gpus", zero.full_depth == 0)
                return generate_alone(*args, **kwargs)

            model.generate = generate

        def refuse(module, *args) -> None:
            if zero.full_depth == 0:
                raise ZeroliteError(
                    "state dicts of a model at stage 3 hold no whole parameters: use zerolite.save, zerolite.export, "
                    "or call it inside `with zerolite.full_params(model, writeback=...)` on every rank"
                )

        model.register_state_dict_pre_hook(refuse)
        model.register_load_state_dict_pre_hook(refuse)
    else:
        # What was loaded must reach the master and, with offload, the host; else the next step would undo it.
        model.register_load_state_dict_post_hook(lambda module, keys: zero.absorb_edits())


def _wait_when_read(model: nn.Module, zero: Zero) -> None:
    """Have whoever asks the model for parameters get those that the workers have stepped."""
    own_parameters = model.named_parameters

    @functools.wraps(own_parameters)
    def named_parameters(*args, **kwargs):
        for name, parameter in own_parameters(*args, **kwargs):
            place = getattr(parameter, "_zerolite_place", None)  # none for one that was added later
            if place is not None:
                zero.settle(place[1].unit)
            yield name, parameter

    def settle(module, *args) -> None:
        zero.settle()

    model.named_parameters = named_parameters  # model.parameters() asks this one
    model.register_state_dict_pre_hook(settle)
    model.register_load_state_dict_pre_hook(settle)


def engine_of(model: nn.Module) -> Zero:
    """The engine behind a sharded model; ValueError where there is none."""
    zero = getattr(model, "_zerolite", None)
    if zero is None:
        raise ValueError(f"this {type(model).__name__} is not sharded: call zerolite.shard(model, stage=...) first")
    return zero


@contextlib.contextmanager
def no_sync(model: nn.Module, enabled: bool = True):
    """Inside, backward adds gradients up on this rank and reduces nothing; the next backward outside reduces the sum.

    It costs a whole unreduced gradient at every stage, in the reduction's dtype; without it each backward reduces and
    adds to this rank's range. A step with gradients that were never reduced reduces them first.
    Every rank must enter it alike.
    """
    zero = engine_of(model)
    was_syncing = zero.is_syncing
    zero.is_syncing = was_syncing and not enabled
    try:
        yield
    finally:
        zero.is_syncing = was_syncing


@contextlib.contextmanager
def full_params(model: nn.Module, writeback: bool = False):
    """Inside, every rank holds whole parameters, and forwards communicate nothing. Collective on entry.

    writeback: keep what was written into the parameters inside; every rank must write the same.
    For evaluation, generation with another number of steps on each rank, inspection and surgery. At stage 3 it costs
    the whole model on every rank.
    """
    zero = engine_of(model)
    zero.gather_all()
    try:
        yield model
    finally:
        zero.release_all(writeback)
