"""What users call on a model: shard, no_sync, full_params."""

import contextlib

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from zerolite.config import Offload, Precision
from zerolite.engine import build, meta_init
from zerolite.engine.engine import Engine, engine_of, info_of
from zerolite.runtime import device as devices
from zerolite.runtime.mesh import mesh_of
from zerolite.shards.layout import Partition
from zerolite.shards.units import UnitRule


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
        `optimizer.step` then returns before they are done. Between `step` and its next use a parameter reads as NaN:
        its unit's next forward, `model.parameters()`, `state_dict`, `full_params`, `save` and `export` fetch it.
    precision: dtypes; None: parameters keep theirs, 16-bit ones are reduced in fp32 and stepped on an fp32 master.
    units: module classes, or a predicate over modules, gathered and freed as one; None: the repeated block class.

    Every rank starts from rank 0's values. Afterwards gradients are the mean over ranks and live in the engine, not in
    `parameter.grad`; optimizers are zerolite's. At stage 3 a parameter reads as NaN outside of forward, backward and
    `full_params`. Requires_grad is what it was here: trainable and frozen parameters of a unit lie in buckets apart.

    What others do to parameters later (`p.data = ...`, `model.to`, a state dict with assign=True, edits in place)
    counts as in torch from the next forward or step on, if every rank does the same; what cannot be is a ValueError
    there: another dtype, shape or device, new parameters, requires_grad turned on. Edits in place through `p.data` are
    seen only where parameters stay unsharded without a master and without offload: write to `p` under `no_grad`.
    An average that is kept beside the model reads parameters inside `full_params`.

    Raises TypeError for a model, mesh, precision or units of another type. Raises ValueError for a stage, mesh, offload
    or units that cannot be, for a model that is sharded already or lies on several GPUs, and for a parameter that is
    complex, trainable in an integer or float8 dtype, over the memory of another one, or on the meta device and
    initialised by nothing. Raises ZeroliteError where the machine has not the memory that offload needs,
    and WorkerError where a worker does not start.
    """
    offload = build.check_arguments(stage, offload, precision)
    if not isinstance(model, nn.Module):
        raise TypeError(f"shard takes a torch.nn.Module, got {type(model).__name__}")
    if any(info_of(parameter) is not None for parameter in model.parameters()):
        raise ValueError("the model, or a part of it, is sharded already: build a new one to shard it in another way")
    device = devices.target(model, mesh)
    engine = Engine(model, Partition(stage), mesh_of(mesh, device), device, precision)
    build.build(engine, units, offload, meta_init.materialize, has_values=True)
    build.finish(engine)
    return model


@contextlib.contextmanager
def no_sync(model: nn.Module, enabled: bool = True):
    """Inside, backward adds gradients up on this rank and reduces nothing; the next backward outside reduces the sum.

    It costs a whole unreduced gradient at every stage, in the reduction's dtype; without it each backward reduces and
    adds to this rank's range. A step with gradients that were never reduced reduces them first.
    Every rank must enter it alike. Raises ValueError for a model that is not sharded.
    """
    engine = engine_of(model)
    was_syncing = engine.is_syncing
    engine.is_syncing = was_syncing and not enabled
    try:
        yield
    finally:
        engine.is_syncing = was_syncing


@contextlib.contextmanager
def full_params(model: nn.Module, writeback: bool = False):
    """Inside, every rank holds whole parameters, and forwards communicate nothing. Collective on entry.

    writeback: keep what was written into the parameters inside, or stands in their place; every rank must write the
        same. Without it an edit at stage 3 is dropped with a warning; where parameters stay unsharded it counts.
    For evaluation, generation with another number of steps on each rank, inspection and surgery. At stage 3 it costs
    the whole model on every rank. Raises ValueError for a model that is not sharded, WorkerError where a worker failed.
    """
    engine = engine_of(model)
    engine.gather_all()
    try:
        yield model
    finally:
        engine.release_all(writeback)
