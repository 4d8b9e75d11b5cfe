"""What users call on a model: shard, compile, no_sync, full_params."""

import contextlib
from collections.abc import Sequence

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from zerolite.config import Offload, Precision
from zerolite.engine import build, compiled, meta_init
from zerolite.engine.engine import Engine, engine_of, info_of
from zerolite.engine.prefetch import gather_all, release_all
from zerolite.runtime import device as devices
from zerolite.runtime.mesh import mesh_of
from zerolite.shards.dtensors import groups_of
from zerolite.shards.layout import Partition
from zerolite.shards.units import UnitRule


def shard(
    model: nn.Module,
    stage: int,
    mesh: DeviceMesh | None = None,
    offload: Offload | str | None = None,
    precision: Precision | None = None,
    units: UnitRule | None = None,
    norm_over: Sequence[DeviceMesh] = (),
) -> nn.Module:
    """Partition a model's training state over ranks, in place, and return it. Collective.

    stage: 0 nothing is sharded (as DDP), 1 optimizer states, 2 also gradients, 3 also parameters.
    mesh: 1-D (shard) or 2-D (replicate x shard) over all ranks, or the slice of a larger mesh whose ranks have other
        data; None: the whole world shards.
    offload: "cpu" or an `Offload`: gradients and optimizer states in host memory, stepped by worker processes.
        `optimizer.step` then returns before they are done. Between `step` and its next use a parameter reads as NaN:
        its unit's next forward, `model.parameters()`, `state_dict`, `full_params`, `save` and `export` fetch it.
    precision: dtypes; None: parameters keep theirs, 16-bit ones are reduced in fp32 and stepped on an fp32 master.
    units: module classes, or a predicate over modules, gathered and freed as one; None: the repeated block class.
    norm_over: slices of the same mesh over pipeline stages: their gradients count in one norm, and Inf or NaN in one
        stage skips the step of all.

    Beside other parallelisms: mesh = init_device_mesh("cuda", (2, 2, 2), mesh_dim_names=("pp", "dp", "tp")), first
    parallelize_module(stage, mesh["tp"], plan), then shard(stage, 3, mesh=mesh["dp"], norm_over=(mesh["pp"],)).
    DTensor parameters keep their placements, and norms count split and whole ones once. Several stages of one rank
    (interleaved schedules) are one model: shard(nn.ModuleList(stages), ...). Weights that stages share are not kept
    equal: give each stage its own. Schedules that write gradients themselves (zero bubble) are refused in backward.

    A model on a GPU trains there. One on the CPU goes to this rank's GPU, by LOCAL_RANK, a unit at a time, so it may be
    larger than the GPU; it stays where no GPU is visible (CUDA_VISIBLE_DEVICES=""), the mesh is of the CPU, or the
    process group has no NCCL. The GPU becomes this thread's current device.

    Every rank starts from rank 0's values. Afterwards gradients are the mean over ranks and lie in shards;
    `parameter.grad` is a handle that answers norms (collective), scaling and clearing. Optimizers are zerolite's. At
    stage 3 a parameter reads as NaN outside of forward, backward and `full_params`. Requires_grad is what it was here:
    trainable and frozen parameters of a unit lie in buckets apart.

    Every rank must run the same modules and optimizer steps in the same order. gloo's ranks that do not are told so at
    once, where they go on to another collective. Else, and with NCCL, a rank that waits for a minute warns with every
    rank's call and line, and waits on until the process group's timeout, 10 minutes where it is started here. What
    fails on one rank ends the collectives of all, with that text, an error that nobody catches too (`sys.excepthook` is
    extended). With TORCH_DISTRIBUTED_DEBUG=DETAIL in the environment torch compares every collective and names the
    first that differs.

    What others do to parameters later (`p.data = ...`, `model.to`, a state dict with assign=True, edits in place)
    counts as in torch from the next forward or step on, if every rank does the same; what cannot be is a ValueError
    there: another dtype, shape or device, new parameters, requires_grad turned on. `p.data.clamp_()` counts like
    `p.clamp_()` under `no_grad`; an alias of `p.data` that is kept and written later may be lost. At stage 3 a view of
    a parameter (`p.detach()`) that is kept has no memory once its unit is left: keep `p`, or a clone.
    An average that is kept beside the model reads parameters inside `full_params`.

    Raises TypeError for a model, mesh, norm_over, precision or units of another type. Raises ValueError for a stage,
    mesh, offload or units that cannot be, for a model that is sharded already or lies on several GPUs, for a LOCAL_RANK
    beyond the visible GPUs, for a process group without NCCL of a model on a GPU, and for a parameter that is complex,
    trainable in an integer or float8 dtype, over the memory of another one, or on the meta device and initialised by
    nothing. Beside other parallelisms: for dimensions of a mesh that overlap or are left out, for a DTensor that is
    partial or has no values, for adapters, and for weights that transformers ties over pipeline stages.
    Raises ZeroliteError where the machine has not the memory that offload needs, and, on every rank with both values,
    where ranks give unlike models or arguments. Raises WorkerError where a worker does not start.
    """
    offload = build.check_arguments(stage, offload, precision)
    if not isinstance(model, nn.Module):
        raise TypeError(f"shard takes a torch.nn.Module, got {type(model).__name__}")
    if any(info_of(parameter) is not None for parameter in model.parameters()):
        raise ValueError("the model, or a part of it, is sharded already: build a new one to shard it in another way")
    device = devices.target(model, mesh)
    ranks = mesh_of(mesh, device, groups_of(model), norm_over)
    engine = Engine(model, Partition(stage), ranks, device, precision)
    build.build(engine, units, offload, meta_init.materialize, has_values=True)
    build.finish(engine)
    return model


def compile(model: nn.Module, **options) -> nn.Module:
    """Compile the forward of every unit of a sharded model by `torch.compile(forward, **options)`; the same model.

    Each unit is one graph with its hooks outside; at stage 3, too, nothing is compiled again. Units of a class share
    what is compiled; `torch._dynamo.config.recompile_limit` is raised where they could differ by a number. A unit that
    contains others, as the root does, runs as it is written. Copies of the model are not compiled.

    Call it after `shard`, and after adapters were added. Raises ValueError for a model that is not sharded, for one
    whose only unit is itself, for a unit whose graph would break, since it shares a parameter with another one, and for
    modes with CUDA graphs at stage 3, where parameters have other addresses at each gather.
    """
    compiled.compile_units(engine_of(model), options)
    return model


@contextlib.contextmanager
def no_sync(model: nn.Module, enabled: bool = True):
    """Inside, backward adds gradients up on this rank and reduces nothing; the next backward outside reduces the sum.

    It costs a whole unreduced gradient at every stage, in the reduction's dtype; without it each backward reduces and
    adds to this rank's range. A step with gradients that were never reduced reduces them first, and so does the first
    norm of a `parameter.grad`, which every rank must ask for.
    Every rank must run as many backwards outside; inside they may run other numbers, as in DDP. At stage 3, where
    forwards communicate, every rank must run the same. Raises ValueError for a model that is not sharded.
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
    gather_all(engine)
    try:
        yield model
    finally:
        release_all(engine, writeback)
