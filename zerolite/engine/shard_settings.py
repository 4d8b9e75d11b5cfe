"""What of `shard` every rank must have been given alike: compared before a collective depends on it."""

from collections.abc import Sequence

import torch
from torch import nn

from zerolite.config import Offload, parse_bytes
from zerolite.engine.engine import Engine, all_ranks, stage_ranks
from zerolite.offload.placement import DtypeOf
from zerolite.runtime.rank_settings import compare_settings
from zerolite.shards.dtensors import placed
from zerolite.shards.units import ParameterGroup, UnitPlan


def compare_shards(
    engine: Engine, plans: Sequence[UnitPlan], offload: Offload | None, dtype_of: DtypeOf, has_values: bool
) -> None:
    """ZeroliteError on every rank, with both values, where ranks are about to shard unlike models. Collective.

    Without it a message of another size ends a process of gloo and hangs NCCL, and another dtype or precision at
    stage 0 trains replicas that differ for ever.
    """
    mesh, precision = engine.mesh, engine.precision
    settings = {
        "version of torch": torch.__version__.split("+")[0],  # a build for another device is no other version
        "stage": str(engine.partition.stage),
        "mesh": f"{mesh.replicas.size} x {mesh.shard.size}",
        "precision": f"{precision.param}, reduced in {precision.reduce}" if precision is not None else "None",
        "scaler": str(vars(engine.loss_scale)) if engine.loss_scale is not None else "None",
        "offload": _offload(offload),
    }
    for plan in plans:
        for index, group in enumerate(plan.groups):
            for name, parameter in zip(group.names, group.parameters, strict=True):
                where = f"in group {index} of unit {plan.name}{_kind(group, has_values)}"
                settings[f"parameter {name}"] = f"{_tensor(parameter, dtype_of(parameter))} {where}{placed(parameter)}"
    settings |= {f"buffer {name}": _tensor(buffer, buffer.dtype) for name, buffer in engine.model.named_buffers()}
    what = "what zerolite.shard or zerolite.load_pretrained was given"
    compare_settings(stage_ranks(engine), what, settings)
    if mesh.pipeline:
        alike = {name: settings[name] for name in ("version of torch", "scaler", "offload")}
        compare_settings(all_ranks(engine), f"{what}, over pipeline stages", alike)


def _offload(offload: Offload | None) -> str:
    """What changes numbers or the order of collectives; workers, threads and path are each rank's own."""
    if offload is None:
        return "None"
    budget = parse_bytes(offload.budget) if offload.budget is not None else None
    return f"Offload(parameters={offload.parameters}, budget={budget}, states={offload.states})"


def _kind(group: ParameterGroup, has_values: bool) -> str:
    """A parameter on the meta device may have values on another rank: all start from rank 0's."""
    kind = ", trainable" if group.is_trainable else ", frozen"
    kind += ", unsharded" if group.stays_unsharded else ""
    return kind + (", read from files" if group.is_on_meta and not has_values else "")


def _tensor(tensor: nn.Parameter | torch.Tensor, dtype: torch.dtype) -> str:
    return f"{tuple(tensor.shape)} {dtype}"
