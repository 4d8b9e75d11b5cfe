"""The walk of a parameter: shard, unshard, reshard, reduce. What ZeRO does, in one place.

Stage is decided here, once, and becomes three facts a bucket: whether this rank owns all of it or a piece (steps),
whether whole gradients stay, whether full parameters stay. Nothing below asks for the stage.

    stage   owns      whole gradients stay   full parameters stay
    0       all       yes                    yes
    1       a piece   yes                    yes
    2       a piece   no                     yes
    3       a piece   no                     no (adapters: yes)

[Note: the order of collectives]
Every rank must issue the same collectives in the same order, whatever order autograd delivers gradients in. So
reductions are launched strictly in `reduction_order` (the reverse of registration): a bucket that is ready early waits
for its predecessors, one that never fills (a parameter without a gradient on this rank) is launched, with zeros,
when its unit's backward has passed, or at the end of backward. Nothing is recorded from an earlier step.

[Note: late gradients]
A gradient may come after its bucket was launched (a layer used in two reentrant checkpoints). It stays in the local
sum, as inside `no_sync`, and is reduced by the next backward or, after all ranks agreed on it, by the step.

What FSDP2 has and this has not: DTensor parameters and tensor parallelism, per-parameter sharding with dim-0 shards,
a choice per module to keep parameters after forward, torch.compile of the hooks, meta-device deferred load by DCP.
What DeepSpeed has and this has not: an engine object with its own training loop, quantised communication (ZeRO++),
a recorded trace for prefetching, persistence thresholds for small parameters, expert parallelism.
"""

import torch
from torch import nn
from torch.autograd import Variable

from zerolite.config import Precision, reduce_dtype
from zerolite.engine.loss_scale import LossScale
from zerolite.errors import ZeroliteError
from zerolite.offload.fetch import WayBack
from zerolite.offload.host import Host
from zerolite.offload.host_shard import HostBucket
from zerolite.runtime import device as devices
from zerolite.runtime.collectives import Group
from zerolite.shards.gradients import BufferPool, GradientBucket
from zerolite.shards.layout import BucketLayout, pack
from zerolite.shards.parameters import FlatBucket
from zerolite.shards.units import BUCKET_NUMEL, FROZEN_BUCKET_NUMEL, ParameterGroup, UnitPlan


class Bucket:
    """One flat bucket: its parameters and, where they are trainable, its gradients."""

    flat: FlatBucket
    gradients: GradientBucket | None

    def __init__(
        self, unit: "Unit", flat: FlatBucket, gradients: GradientBucket | None, position: int, group: ParameterGroup
    ):
        self.unit = unit
        self.stays_whole, self.was_on_meta = group.stays_whole, group.is_on_meta
        self.flat = flat
        self.gradients = gradients
        self.layout = flat.layout
        self.position = position  # of its first parameter, in the order of registration
        self.ready: set[int] = set()  # slots whose gradient came, or cannot come any more, in this backward


class Unit:
    """Parameters that are gathered and freed together, around the forward and the backward of one module."""

    def __init__(self, name: str, module: nn.Module, is_root: bool):
        self.name = name
        self.module = module
        self.is_root = is_root
        self.buckets: list[Bucket] = []
        self.index = 0  # in `Zero.units`
        self.forward_depth = 0  # forwards of the module that are running now
        self.backward_uses = 0  # of the module, begun and not ended, in this backward
        self.pending_uses = 0  # forwards whose backward has not ended; a hint only, a graph may be dropped

    def unshard(self) -> bool:
        """Start gathering what is not here; whether anything was started. Collective."""
        return any([bucket.flat.unshard() for bucket in self.buckets])

    def wait(self) -> None:
        for bucket in self.buckets:
            bucket.flat.wait()

    def reshard(self) -> None:
        for bucket in self.buckets:
            bucket.flat.reshard()


class Zero:
    """The engine of one model: its units, its groups, and what happens before and after each forward and backward."""

    def __init__(
        self,
        model: nn.Module,
        stage: int,
        shard_group: Group,
        replicate_group: Group,
        device: torch.device,
        precision: Precision | None,
    ):
        self.host: Host | None = None  # set by `placement` where something is offloaded
        self.way_back = WayBack()
        self.model = model
        self.stage = stage
        self.shard_group, self.replicate_group = shard_group, replicate_group
        self.device = devices.of(device)
        self.precision = precision
        self.units: list[Unit] = []
        self._near: dict[tuple[Unit, int], list[Unit]] = {}  # (unit, step) -> its neighbours
        self.reduction_order: list[Bucket] = []
        self.pool = BufferPool()
        self.reduce_stream = self.device.new_stream()
        self.loss_scale = LossScale.of(precision)
        self.is_syncing = True  # False inside no_sync
        self.full_depth = 0  # nested full_params
        self.gradient_version = 0  # counts what changes the reduced gradients, so that a norm knows when it is stale
        self.gather_digest = 0  # of the units gathered so far and their order, compared over ranks by every step
        self._is_backward_open = False
        self._was_loss_scaled = False
        self._next_launch = 0
        self._last_launched: Bucket | None = None
        self._last_landed: Bucket | None = None

    @property
    def world_size(self) -> int:
        return self.shard_group.size * self.replicate_group.size

    @property
    def rank(self) -> int:
        """This rank's number in the mesh, shard dimension fastest."""
        return self.replicate_group.rank * self.shard_group.size + self.shard_group.rank

    def gather_facts(self, facts: torch.Tensor) -> torch.Tensor:
        """Every rank's few fp64 numbers (n,) as (replicas, shards, n) on the host. Collective."""
        facts = facts.to(self.device.device)
        shards = self.shard_group.gather_facts(facts)
        replicas = self.replicate_group.gather_facts(shards.reshape(-1).to(facts.device))
        return replicas.view(self.replicate_group.size, self.shard_group.size, facts.numel())

    # Shard #

    def layouts_of(self, group: ParameterGroup) -> list[BucketLayout]:
        """The buckets of one group of a unit's plan."""
        parameters = zip(group.names, group.parameters, strict=True)
        bucket_numel = BUCKET_NUMEL if group.is_trainable else FROZEN_BUCKET_NUMEL
        return pack([(name, tuple(p.shape)) for name, p in parameters], self.shard_group.size, bucket_numel)

    def owned_numel(self, layout: BucketLayout) -> int:
        return layout.numel if self.stage == 0 else layout.piece_numel

    def add_unit(self, plan: UnitPlan, has_values: bool, dtype_of, is_on_host: bool = False) -> Unit:
        """Make a unit's parameters flat and keep this rank's range. Collective.

        has_values: what was on the meta device has got values since; else it starts as zeros, for the caller to fill.
        is_on_host: workers step it; where parameters are offloaded too, they lie there.
        """
        owns_all, keeps_whole = self.stage == 0, self.stage <= 1 or self.shard_group.size == 1
        unit = Unit(plan.name, plan.module, plan.module is self.model)
        for group in plan.groups:
            streams = self.host is not None and self.host.offload.parameters and not group.stays_whole
            is_whole = self.stage <= 2 or self.shard_group.size == 1 or group.stays_whole
            dtype = dtype_of(group.parameters[0])
            by_name = dict(zip(group.names, group.parameters, strict=True))
            position = group.position
            for layout in self.layouts_of(group):
                parameters = [by_name[slot.name] for slot in layout.slots]
                start, stop = (0, layout.numel) if owns_all else layout.piece(self.shard_group.rank)
                gradient_dtype = reduce_dtype(self.precision, dtype) if plan.is_trainable else None
                host = None
                if streams or (is_on_host and plan.is_trainable):
                    host = HostBucket(self.host, layout, start, stop, dtype, gradient_dtype)
                flat = FlatBucket(
                    layout,
                    parameters,
                    has_values or not group.is_on_meta,
                    dtype=dtype,
                    device=self.device,
                    group=self.shard_group,
                    replicas=self.replicate_group,
                    owns_all=owns_all,
                    is_resident=is_whole and not streams,
                    is_trainable=plan.is_trainable,
                    host=host,
                    streams=streams,
                )
                gradients = None
                if plan.is_trainable:
                    gradients = GradientBucket(
                        layout,
                        flat.start,
                        flat.stop,
                        dtype=gradient_dtype,
                        device=self.device,
                        stream=self.reduce_stream,
                        shard_group=self.shard_group,
                        replicate_group=self.replicate_group,
                        keeps_whole=keeps_whole,
                        pool=self.pool,
                        host=host,
                    )
                unit.buckets.append(Bucket(unit, flat, gradients, position, group))
                position += len(parameters)
        unit.index = len(self.units)
        self.units.append(unit)
        self.reduction_order = sorted(
            (bucket for unit in self.units for bucket in unit.buckets if bucket.gradients is not None),
            key=lambda bucket: -bucket.position,
        )
        return unit

    # Forward #

    def pre_forward(self, unit: Unit) -> None:
        in_backward = is_in_backward()
        if in_backward:
            self.open_backward()  # a recomputation: this is the outer backward, the nested one comes after it
        elif self._is_backward_open:
            self.abandon_backward()  # the last one raised
        unit.forward_depth += 1
        if unit.forward_depth == 1:
            self._gather(unit, -1 if in_backward else 1)

    def post_forward(self, unit: Unit, needs_backward: bool) -> None:
        unit.forward_depth -= 1
        if is_in_backward() or unit.forward_depth > 0:
            return
        if needs_backward:
            unit.pending_uses += 1
            if unit.is_root or unit.module is self.units[-1].module:
                return  # backward begins with what forward ended with
        self._free(unit)

    def _gather(self, unit: Unit, step: int) -> None:
        """Make the unit whole, with its neighbours' gathers under way: the next ones, in backward the previous ones."""
        neighbours = self._neighbours(unit, step)
        communicates = any(bucket.flat.communicates for other in neighbours for bucket in other.buckets)
        self.way_back.take(max([unit.index, *(other.index for other in neighbours)]) if communicates else unit.index)
        self._unshard(unit)
        for other in neighbours:
            self._unshard(other)
        unit.wait()

    def _neighbours(self, unit: Unit, step: int) -> list[Unit]:
        """The units (frozen and trainable) of the next module; none behind the last one. Found once, asked every time.

        The root comes first in forward and, by Python's negative indices, is followed by the last in backward.
        """
        if (unit, step) not in self._near:
            self._near[unit, step] = self._find_neighbours(unit, step)
        return self._near[unit, step]

    def _find_neighbours(self, unit: Unit, step: int) -> list[Unit]:
        for index in range(unit.index + step, len(self.units) if step > 0 else unit.index - len(self.units), step):
            module = self.units[index].module
            if module is not unit.module:
                return [other for other in self.units if other.module is module]
        return []

    def _unshard(self, unit: Unit) -> None:
        if unit.unshard():
            self.gather_digest = (31 * self.gather_digest + unit.index + 1) % (1 << 48)

    def _free(self, unit: Unit) -> None:
        has_failed = self.host is not None and self.host.pool.failure is not None  # that error is on its way already
        if self.full_depth == 0 and not has_failed:
            unit.reshard()

    def send_away(self, buckets: list[Bucket]) -> None:
        """Workers are stepping these buckets, in the order of units."""
        self.way_back.send(buckets, self.device.record())

    def settle(self, unit: Unit | None = None) -> None:
        """Have the parameters of all units up to `unit`, or of all, back and readable."""
        if self.host is not None:
            units = self.units if unit is None else self.units[: unit.index + 1]
            self.way_back.take(units[-1].index)
            for bucket in (bucket for other in units for bucket in other.buckets):
                if bucket.flat.is_hidden:
                    bucket.flat.wait()

    # Backward #

    def open_backward(self) -> None:
        """Have `finish_backward` called when the present, outermost backward ends. Idempotent within one backward."""
        if not self._is_backward_open:
            self._is_backward_open = True
            self.settle()  # what no forward of this rank needed; its peers' forwards may have
            for bucket in self.reduction_order:
                bucket.gradients.fold()
            Variable._execution_engine.queue_callback(self.finish_backward)

    def pre_backward(self, unit: Unit, is_first: bool) -> None:
        """A node that made one of the unit's outputs is about to run; `is_first` in the backward of this use."""
        self.open_backward()
        unit.backward_uses += is_first
        self._gather(unit, -1)

    def post_backward(self, unit: Unit) -> None:
        """The gradients of the unit's inputs are complete, so its parameters are needed no more in this use."""
        unit.backward_uses -= 1
        unit.pending_uses -= 1
        if unit.backward_uses <= 0:
            self._free(unit)
        if unit.pending_uses <= 0 and self.is_syncing:
            for bucket in unit.buckets:
                bucket.ready.update(range(len(bucket.layout.slots)))
            self._launch_ready()

    def take_gradient(self, bucket: Bucket, index: int, parameter: nn.Parameter) -> None:
        """Autograd has completed `parameter.grad`: move it into the bucket."""
        self.open_backward()
        gradient, parameter.grad = parameter.grad, None
        if gradient.layout != torch.strided:
            raise ValueError(
                f"{bucket.layout.slots[index].name} has a sparse gradient; zerolite reduces dense ones: "
                "build the embedding with sparse=False"
            )
        bucket.gradients.take(index, gradient.detach())
        self.gradient_version += 1
        if self.is_syncing:
            bucket.ready.add(index)
            self._launch_ready()

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
            for bucket in self.reduction_order[self._next_launch :]:
                self._launch(bucket)
            self._land_last()
        self._reset_round()

    def abandon_backward(self) -> None:
        """A backward raised and never finished: forget where it was; its gradients stay until they are cleared."""
        self._is_backward_open = self._was_loss_scaled = False
        self._land_last()
        self._reset_round()

    def _reset_round(self) -> None:
        self._next_launch = 0
        self._let_go_last()
        self.pool.clear()
        for bucket in self.reduction_order:
            bucket.ready.clear()
        for unit in self.units:
            unit.backward_uses = unit.pending_uses = 0
            self._free(unit)

    # Reduce #

    def _launch_ready(self) -> None:
        while self._next_launch < len(self.reduction_order):
            bucket = self.reduction_order[self._next_launch]
            if len(bucket.ready) < len(bucket.layout.slots):
                return
            self._launch(bucket)
            self._next_launch += 1

    def _launch(self, bucket: Bucket) -> None:
        """Start one reduction and finish the one before it. See [Note: the order of collectives]."""
        bucket.gradients.launch()
        self._land_last()
        self._last_launched = bucket

    def _land_last(self) -> None:
        if self._last_launched is not None:
            self._last_launched.gradients.land()
            if self._last_landed is not None:
                self._last_landed.gradients.let_go()
            self._last_landed, self._last_launched = self._last_launched, None
            self.gradient_version += 1

    def _let_go_last(self) -> None:
        if self._last_landed is not None:
            self._last_landed.gradients.let_go()
            self._last_landed = None

    def reduce_late(self, buckets: list[Bucket]) -> None:
        """Reduce local sums that no backward has reduced. Collective: the same buckets on every rank."""
        for bucket in buckets:
            self._launch(bucket)
        self._land_last()
        self._let_go_last()
        self.pool.clear()

    def clear_gradients(self, set_to_none: bool = True, slots: dict[Bucket, list[int]] | None = None) -> None:
        """Forget gradients: of all parameters, or of some slots of some buckets."""
        if self._is_backward_open and not is_in_backward():
            self.abandon_backward()
        if slots is None:
            slots = {bucket: range(len(bucket.layout.slots)) for bucket in self.reduction_order}
        for bucket, indices in slots.items():
            bucket.gradients.clear(indices, set_to_none)
        self.gradient_version += 1

    # Step and whole parameters #

    def before_step(self) -> None:
        """Nothing gathered may outlive a step, and nothing be away from the last one."""
        if self._is_backward_open:
            self.abandon_backward()
        self.settle()
        for unit in self.units:
            if self.full_depth == 0:
                unit.reshard()

    def gather_all(self) -> None:
        """Gather every unit and keep it. Collective."""
        self.settle()
        self.full_depth += 1
        for unit in self.units:
            self._unshard(unit)
        for unit in self.units:
            unit.wait()

    def release_all(self, writeback: bool) -> None:
        self.settle()  # a step inside is no edit
        if writeback:
            self.absorb_edits()
        self.full_depth -= 1
        for unit in self.units:
            self._free(unit)

    @torch.no_grad()
    def absorb_edits(self) -> None:
        """Take what somebody wrote into full parameters into what is stepped."""
        for unit in self.units:
            for bucket in unit.buckets:
                bucket.flat.absorb_edits()

    def mark_loss_scaled(self) -> None:
        self._was_loss_scaled = True


def is_in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
