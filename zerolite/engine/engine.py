"""The walk of a parameter: unshard, reshard, reduce. What happens before and after each forward and backward.

    verb       called by                       what moves
    shard      zerolite.shard, see build.py    full parameters -> this rank's range; the rest is freed
    unshard    pre-forward, pre-backward       all-gather into the bucket's flat buffer
    reshard    post-forward, post-backward     nothing; storage is freed
    reduce     last gradient of a bucket       reduce-scatter, on its own stream: reducer.py
    step       optimizer.step                  the rule runs on the shard, here or in a worker: optim/
    fetch      before a unit's next forward    H2D of what workers stepped, then all-gather: offload/fetch.py

What FSDP2 has and this has not: per-parameter sharding with dim-0 shards, a choice per module to keep parameters after
forward, torch.compile of the hooks, meta-device deferred load by DCP.
What DeepSpeed has and this has not: an engine object with its own training loop, quantised communication (ZeRO++),
a recorded trace for prefetching, persistence thresholds for small parameters, expert parallelism.
"""

import weakref
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.autograd import Variable

from zerolite.config import Precision
from zerolite.engine.grad_handle import GradHandle
from zerolite.engine.grad_handles import GradHandles
from zerolite.engine.graph_task import is_in_backward
from zerolite.engine.loss_scale import LossScale
from zerolite.engine.parameter_guard import ParameterGuard
from zerolite.engine.prefetch import neighbour
from zerolite.engine.reducer import Reducer
from zerolite.errors import ZeroliteError
from zerolite.offload.placement import Placement
from zerolite.runtime import abort, trace
from zerolite.runtime import device as devices
from zerolite.runtime.mesh import ModelRanks, RankMesh
from zerolite.shards.bucket import Bucket, TrainableBucket, Unit
from zerolite.shards.dtensors import is_distributed, local_gradient
from zerolite.shards.layout import Partition


class Engine:
    """What `zerolite.shard` leaves on a model: its units, its ranks, its reducer."""

    def __init__(
        self,
        model: nn.Module,
        partition: Partition,
        mesh: RankMesh,
        device: torch.device,
        precision: Precision | None,
    ):
        self.model = model
        self.partition = partition
        self.mesh = mesh
        self.device = devices.of(device)
        self.precision = precision
        self.has_dtensors = any(map(is_distributed, model.parameters()))
        self.units: list[Unit] = []  # the root first
        self.guard = ParameterGuard(model, self.units)  # watches from `build.finish` on
        self.reducer = Reducer(self.device)
        self.handles = GradHandles(self)
        self.placement = Placement()  # set by `build`, with the queue of what workers have stepped
        self.fetch_queue = self.placement.fetch_queue
        self.loss_scale = LossScale.of(precision)
        self.is_syncing = True  # False inside no_sync
        self.full_depth = 0  # nested full_params
        self.gather_order_hash = 0  # of the units gathered so far, in order; compared over ranks by every step
        self._entered: set[Unit] = set()  # gathered for a read that no output announced: entries.py
        self._near_end: set[Unit] = set()  # in backward, some of its inputs' gradients have come
        self._keeps_gathered = False  # a backward with create_graph=True has been: nodes that it made read parameters
        self._is_backward_open = False
        self._was_loss_scaled = False

    def __reduce__(self):
        raise ZeroliteError(
            "a part of a sharded model, or something that refers to it, cannot be copied or pickled alone: it would "
            "share the engine; copy the whole model (copy.deepcopy(model).<part>), or take state_dict()"
        )

    def all_gather_scalars(self, scalars: torch.Tensor) -> torch.Tensor:
        """Few fp64 numbers (n,) of every rank with other data, as (replicas, shards, n) on the host. Collective.

        Fetches come first: one rank may have started some of them alone, by reading parameters.
        """
        self.fetch()
        return self.mesh.all_gather_scalars(scalars.to(self.device.device))

    # Forward #

    def pre_forward(self, unit: Unit) -> None:
        in_backward = is_in_backward()
        if in_backward and not self._is_backward_open:
            self.open_backward()  # a recomputation: this is the outer backward, the nested one comes after it
        elif self._is_backward_open and not in_backward:
            self.abandon_backward()  # the last one raised
        if unit.is_root and unit.forward_depth == 0 and not in_backward:
            self.guard.check()
        unit.forward_depth += 1
        if unit.forward_depth == 1:
            self._gather(unit, -1 if in_backward else 1)
            unit.end_forward = trace.flight("recompute" if in_backward else "forward", unit.name)

    def post_forward(self, unit: Unit, needs_backward: bool) -> None:
        unit.forward_depth -= 1
        if unit.forward_depth == 0:
            unit.end_forward()
        if is_in_backward() or unit.forward_depth > 0:
            return
        if needs_backward:
            unit.pending_uses += 1
        if unit.is_root:
            self._leave_entered()
        if needs_backward and (unit.is_root or unit is self.units[-1]):
            return  # backward begins with what forward ended with
        self.free(unit)

    def _gather(self, unit: Unit, step: int) -> None:
        """Make a unit readable, with the gather of its neighbour under way: the next unit, in backward the previous."""
        ahead = neighbour(self.units, unit, step)
        last = max(unit.index, ahead.index) if ahead is not None and ahead.communicates else unit.index
        with trace.phase("unshard", unit.name):
            self.fetch_queue.fetch_until(last)
            self.unshard(unit)
            if ahead is not None:
                self.unshard(ahead)
            unit.wait()

    def unshard(self, unit: Unit) -> None:
        """Start gathering a unit. Collective."""
        if unit.unshard():
            self.gather_order_hash = (31 * self.gather_order_hash + unit.index + 1) % (1 << 48)

    def free(self, unit: Unit) -> None:
        """Free a unit's unsharded parameters, unless `full_params` or a second backward needs them."""
        is_wanted = self.full_depth > 0 or self._keeps_gathered
        if not is_wanted and not self.fetch_queue.has_failed and not abort.has_failed():  # that error is on its way
            unit.reshard()

    def fetch(self, unit: Unit | None = None) -> None:
        """Make what workers have stepped readable, of all units up to `unit`, or of all."""
        if self.fetch_queue.shards:
            self.fetch_queue.synchronize(len(self.units) if unit is None else unit.index)

    # Backward #

    def open_backward(self) -> None:
        """Have `finish_backward` called when the present, outermost backward ends."""
        self._is_backward_open = True
        # Fetch units that this rank's forward skipped: another rank may have used them and already issued their
        # all-gathers.
        self.fetch()
        self.handles.withdraw()
        self.reducer.begin_backward()
        Variable._execution_engine.queue_callback(self.finish_backward)

    def pre_backward(self, unit: Unit, is_first: bool) -> None:
        """A node that made one of the unit's outputs is about to run; `is_first` in the backward of this use."""
        if not self._is_backward_open:
            self.open_backward()
        self._keeps_gathered |= torch.is_grad_enabled()
        unit.backward_uses += is_first
        self._leave_entered(unit)
        self._gather(unit, -1)
        if is_first:
            unit.end_backward = trace.flight("backward", unit.name)

    def enter(self, unit: Unit, by_saved_tensor: bool) -> None:
        """Gather a unit for a read that no hook has announced: entries.py. Collective."""
        if is_in_backward() and not self._is_backward_open:
            self.open_backward()
        self._keeps_gathered |= by_saved_tensor and torch.is_grad_enabled()
        self._entered.add(unit)
        self._gather(unit, -1 if is_in_backward() else 0)

    def expect_end(self, unit: Unit) -> None:
        """The gradient of one of the unit's inputs is complete; others may never come."""
        self._near_end.add(unit)

    def _leave_entered(self, begun: Unit | None = None) -> None:
        """Forward or backward goes on elsewhere: free what was gathered for single reads."""
        for unit in (self._entered | self._near_end) - {begun}:
            if unit.forward_depth == 0 and (unit.backward_uses <= 0 or unit in self._near_end):
                self.free(unit)
        self._entered.clear()
        self._near_end.clear()

    def post_backward(self, unit: Unit, has_begun: bool) -> None:
        """The gradients of the unit's inputs are complete, so its parameters are needed no more in this use.

        has_begun: whether a hook on one of its outputs ran.
        """
        unit.backward_uses -= has_begun
        unit.pending_uses -= 1
        unit.end_backward()
        unit.end_backward = trace.nothing
        if unit.backward_uses <= 0:
            self.free(unit)
        if unit.pending_uses <= 0 and self.is_syncing:
            self.reducer.mark_passed(unit)

    def accumulate_gradient(self, bucket: TrainableBucket, index: int, parameter: torch.Tensor) -> None:
        """Autograd has completed `parameter.grad`: move it into the bucket."""
        gradient, parameter.grad = parameter.grad, None
        if type(gradient) is GradHandle:  # the backward reached the parameter before it reached the engine
            handle, gradient = gradient, gradient.incoming
            handle.incoming, parameter.grad = None, handle
        assert gradient is not None, "autograd calls this when the gradient is complete"
        if not self._is_backward_open:
            self.open_backward()
        gradient = local_gradient(parameter, gradient) if self.has_dtensors else gradient
        if gradient.layout != torch.strided:
            raise ValueError(
                f"{bucket.layout.slots[index].name} has a sparse gradient; zerolite reduces dense ones: "
                "build the embedding with sparse=False"
            )
        bucket.gradients.accumulate(index, gradient.detach())
        self.reducer.version += 1
        if len(parameter._post_accumulate_grad_hooks) > 1:
            self.handles.show(bucket, index)  # to hooks of others
        if self.is_syncing:
            self.reducer.mark_ready(bucket, index)

    def finish_backward(self) -> None:
        """The end of the outermost backward: reduce what is left, free what is gathered."""
        self._is_backward_open = False
        if self.loss_scale is not None and not self._was_loss_scaled:
            raise ZeroliteError(
                "fp16 gradients came from a backward that did not pass through the model's output, so the loss was not "
                "scaled: call the model itself and compute the loss from what it returns"
            )
        self._was_loss_scaled = False
        if self.is_syncing:
            self.reducer.finish()
        self._end_backward()

    def abandon_backward(self) -> None:
        """A backward raised and never finished: forget where it was; its gradients stay until they are cleared."""
        self._is_backward_open = self._was_loss_scaled = False
        self.reducer.drain()
        self._end_backward()

    def end_open_backward(self) -> None:
        """Forget a backward that has raised."""
        if self._is_backward_open and not is_in_backward():
            self.abandon_backward()

    def _end_backward(self) -> None:
        self.reducer.reset()
        self.handles.place()
        self._entered.clear()
        self._near_end.clear()
        for unit in self.units:
            unit.backward_uses = unit.pending_uses = 0
            self.free(unit)

    def mark_loss_scaled(self) -> None:
        self._was_loss_scaled = True

    def clear_gradients(self, set_to_none: bool = True, slots: Mapping[Bucket, Sequence[int]] | None = None) -> None:
        """Drop gradients: of all parameters, or of some slots of some buckets."""
        self.end_open_backward()
        self.handles.drop_cleared()
        self.reducer.clear(slots, set_to_none)
        self.handles.clear(slots, set_to_none)

    # Step and whole parameters #

    def before_step(self) -> None:
        """Nothing gathered may outlive a step, and nothing be unfetched from the last one."""
        if is_in_backward():
            raise ZeroliteError(
                "an optimizer steps when loss.backward() has returned: in a hook of it gradients are not yet those of "
                "all ranks"
            )
        if self._is_backward_open:
            self.abandon_backward()
        self.guard.check()
        self.fetch()
        self._keeps_gathered = False
        for unit in self.units:
            if self.full_depth == 0:
                unit.reshard()

    @torch.no_grad()
    def absorb_edits(self) -> None:
        """Store what somebody wrote into unsharded parameters in the shards, which are what is stepped."""
        self.guard.check()
        for unit in self.units:
            for bucket in unit.buckets:
                bucket.parameters.absorb_edits()


class ParameterInfo:
    """Where a sharded parameter lies.

    Graphs own parameters, in C++, and a module may keep a loss with its graph: it must not keep the engine alive.
    """

    __slots__ = ("_bucket", "_engine", "index")

    def __init__(self, engine: Engine, bucket: Bucket, index: int):
        self._engine, self._bucket = weakref.ref(engine), weakref.ref(bucket)
        self.index = index  # of its slot

    @property
    def is_gone(self) -> bool:
        """Whether nobody has the model any more."""
        return self._engine() is None or self._bucket() is None

    @property
    def engine(self) -> Engine:
        engine = self._engine()
        assert engine is not None, "`info_of` gives none that is gone"
        return engine

    @property
    def bucket(self) -> Bucket:
        bucket = self._bucket()
        assert bucket is not None, "`info_of` gives none that is gone"
        return bucket

    @property
    def name(self) -> str:
        return self.bucket.layout.slots[self.index].name

    def __reduce__(self):
        """A pickled parameter is plain torch's."""
        if not self.is_gone and not self.bucket.parameters.is_readable:
            raise ZeroliteError(
                f"{self.name} reads as NaN now and is not pickled: pickle it inside `with zerolite.full_params(model):`"
            )
        return type(None), ()


def info_of(parameter: torch.Tensor) -> ParameterInfo | None:
    """Where `zerolite.shard` has put a parameter; None for one that is not sharded, or whose model is gone."""
    info = getattr(parameter, "_zerolite_info", None)
    return None if info is None or info.is_gone else info


def sharded_info(parameter: torch.Tensor) -> ParameterInfo:
    """Where `zerolite.shard` has put a parameter; ValueError for one that is not sharded."""
    info = info_of(parameter)
    if info is None:
        raise ValueError(
            f"a parameter of shape {tuple(parameter.shape)} belongs to no sharded model: call "
            "zerolite.shard(model, stage=...) first, then build the optimizer from model.parameters()"
        )
    return info


def engine_of(model: nn.Module) -> Engine:
    """The engine behind a sharded model; ValueError where there is none."""
    engine = find_engine(model)
    if engine is None:
        raise ValueError(f"this {type(model).__name__} is not sharded: call zerolite.shard(model, stage=...) first")
    return engine


def stage_ranks(engine: Engine) -> ModelRanks:
    """All ranks of this pipeline stage."""
    return engine.mesh.stage_ranks(engine.device.device, engine.fetch)


def all_ranks(engine: Engine) -> ModelRanks:
    """All ranks that have a part of the model."""
    return engine.mesh.all_ranks(engine.device.device, engine.fetch)


def find_engine(model: nn.Module) -> Engine | None:
    """The engine behind a model; None where it is not sharded."""
    return getattr(model, "_zerolite", None)
