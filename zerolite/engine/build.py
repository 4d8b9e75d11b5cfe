"""How a model becomes sharded: units are planned, placed, made flat one after the other, and hooked."""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from zerolite.config import Offload, Precision, reduce_dtype
from zerolite.engine import hooks, model_methods
from zerolite.engine.data_reads import note_data_reads
from zerolite.engine.distributed import check_parallel, note_distributed_reads
from zerolite.engine.engine import Engine, ParameterInfo
from zerolite.engine.entries import Entries
from zerolite.engine.extensions import extensions_of
from zerolite.engine.foreign_optimizers import refuse_foreign_steps
from zerolite.engine.shard_settings import compare_shards
from zerolite.engine.shardable import check_parameters, is_computed_in
from zerolite.offload.placement import Policy, place
from zerolite.shards.bucket import Bucket, TrainableBucket, Unit
from zerolite.shards.dtensors import cast, local_of
from zerolite.shards.gradients import FlatGradients
from zerolite.shards.layout import Partition
from zerolite.shards.parameters import FlatParameters
from zerolite.shards.shard import BucketSpec
from zerolite.shards.units import ParameterGroup, UnitPlan, UnitRule, layouts_of, plan_units

Materialize = Callable[[nn.Module, UnitPlan, torch.device], None]


def check_arguments(stage, offload, precision) -> Offload | None:
    """ValueError or TypeError for what cannot be; `offload` as a value."""
    partition, offload = Partition(stage), Offload.of(offload)
    if offload is not None and offload.parameters and not partition.shards_parameters:
        raise ValueError(f"Offload(parameters=True) streams what stage 3 shards, got stage={stage}: use stage=3")
    if precision is not None and not isinstance(precision, Precision):
        raise TypeError(f"precision= takes a zerolite.Precision, got {type(precision).__name__}")
    return offload


def build(
    engine: Engine, rule: UnitRule | None, offload: Offload | None, materialize: Materialize, has_values: bool
) -> None:
    """Shard the engine's model. Collective.

    materialize(model, plan, device): gives a unit's parameters their values, where `has_values`; else it only moves
        them off the meta device, and buckets start as zeros, for the caller to fill.
    ValueError and ZeroliteError as of `zerolite.shard`; ranks' arguments are compared before anything else travels.
    """
    model, precision = engine.model, engine.precision

    def dtype_of(parameter: nn.Parameter) -> torch.dtype:
        return precision.param if precision is not None and is_computed_in(parameter.dtype) else parameter.dtype

    check_parameters(model)
    check_parallel(model, engine.mesh)
    for parameter in model.parameters():
        cast(parameter, dtype_of(parameter))
    stays_unsharded = [p for extension in extensions_of(model) for p in extension.stays_unsharded(model)]
    plans = plan_units(model, rule, dtype_of, stays_unsharded)
    compare_shards(engine, plans, offload, dtype_of, has_values)
    policy = Policy(engine.partition, engine.mesh.shard.size, precision, dtype_of)
    engine.placement = place(plans, policy, offload, engine.device, engine.mesh)
    engine.fetch_queue = engine.placement.fetch_queue
    entries = Entries(engine)
    for index, plan in enumerate(plans):
        materialize(model, plan, engine.device.device)
        unit = Unit(plan.name, plan.module, index, plan.module is model)
        for group in plan.groups:
            for bucket in make_buckets(engine, unit, group, dtype_of(group.parameters[0]), has_values):
                unit.add(bucket)
        engine.units.append(unit)
        engine.reducer.add(unit.buckets)
        engine.handles.add(unit.buckets)
        hooks.install(engine, unit, entries)
        for bucket in unit.buckets:
            for slot, parameter in enumerate(bucket.parameters.tensors):
                parameter._zerolite_info = ParameterInfo(engine, bucket, slot)
    if precision is not None:
        hooks.cast_inputs(engine, precision.param)
    if engine.loss_scale is not None:
        hooks.scale_loss(engine)
    model._zerolite = engine
    refuse_foreign_steps()
    note_data_reads()
    if engine.has_dtensors:
        note_distributed_reads()
    model_methods.adapt(engine)


def finish(engine: Engine) -> None:
    """Give every rank rank 0's buffers, and extensions their turn, once parameters have their values. Collective."""
    for module in engine.model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer = buffer.to(engine.device.device).contiguous()  # NCCL takes no other
                local = local_of(buffer)
                engine.mesh.replicas.broadcast(local)
                engine.mesh.shard.broadcast(local)
                for one in engine.mesh.tensor:
                    one.group.broadcast(local)
    for extension in extensions_of(engine.model):
        extension.after_sharding(engine.model)
    engine.guard.watch()


def make_buckets(
    engine: Engine, unit: Unit, group: ParameterGroup, dtype: torch.dtype, has_values: bool
) -> Iterator[Bucket]:
    """Make one group's parameters flat and keep this rank's range. Collective."""
    mesh, partition, placement = engine.mesh, engine.partition, engine.placement
    gradient_dtype = reduce_dtype(engine.precision, dtype) if group.is_trainable else None
    is_unsharded = not partition.shards_parameters or mesh.shard.size == 1 or group.stays_unsharded
    stays_unsharded = is_unsharded and not placement.streams(group)
    keeps_whole = not partition.shards_gradients or mesh.shard.size == 1
    by_name = dict(zip(group.names, group.parameters, strict=True))
    position = group.position
    for layout in layouts_of(group, mesh.shard.size):
        tensors = [by_name[slot.name] for slot in layout.slots]
        owned = partition.owned_range(layout, mesh.shard.rank)
        spec = BucketSpec(layout, unit.name, owned, dtype, gradient_dtype, engine.device, mesh)
        staging = _staging(spec, group, tensors if has_values or not group.is_on_meta else None)
        shard, unsharded = placement.new_shard(unit.index, group, spec, staging, stays_unsharded)
        parameters = FlatParameters(spec, tensors, unsharded, shard, stays_unsharded)
        if group.is_trainable:
            stays_here = keeps_whole and placement.keeps_gradient_on_device(unit.index, group)
            gradients = FlatGradients(spec, shard, engine.reducer.pool, engine.reducer.stream, stays_here)
            yield TrainableBucket(unit, group, position, parameters, shard, gradients)
        else:
            yield Bucket(unit, group, position, parameters, shard, None)
        position += len(tensors)


def _staging(spec: BucketSpec, group: ParameterGroup, tensors: list[nn.Parameter] | None) -> torch.Tensor:
    """The bucket's values in `spec.stepped_dtype`, rank 0's on every rank; zeros where there are none yet. Collective.

    Parameters may be of any dtype and on any device.
    """
    staging = torch.zeros(spec.layout.numel, dtype=spec.stepped_dtype, device=spec.device.device)
    if tensors is not None:
        for slot, parameter in zip(spec.layout.slots, tensors, strict=True):
            slot.range.of(staging).view(slot.shape).copy_(local_of(parameter).detach())
        spec.mesh.replicas.broadcast(staging)  # as DDP does: every rank starts from rank 0's values
        spec.mesh.shard.broadcast(staging)
        for one in spec.mesh.tensor:
            if not one.splits(group.splits):
                one.group.broadcast(staging)
    return staging
