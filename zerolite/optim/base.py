"""A torch.optim.Optimizer whose states cover only the range of each parameter that this rank owns.

`step`, phase by phase:
1. stats    one small all-gather tells every rank the global norm, whether it is finite, and which slots were used;
2. decide   a norm that is not finite skips the step on every rank; else the clip factor, less the loss scale;
3. update   each bucket's shard steps its segments, those of equal hyperparameters and step count at a time;
4. publish  ranks that hold unsharded parameters exchange their ranges, a bucket's exchange behind the next one's step.

Shards that workers step get their commands first, and `step` returns without waiting for them: parameters are fetched
when somebody needs them (offload/fetch.py, [Note: just-in-time fetch]).

What torch.optim has and this has not: sparse gradients, complex parameters, the options that `hyperparameters` names,
and states of whole parameters: `state[p]` holds this rank's part, zeros and step 0 before the first step.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch

from zerolite.engine.engine import Engine, sharded_info
from zerolite.engine.grad_stats import GradStats, reduce_grad_stats
from zerolite.engine.norm_over import over_stages
from zerolite.errors import ZeroliteError
from zerolite.optim.groups import Groups
from zerolite.optim.hyperparameters import check_options
from zerolite.optim.parameter_states import StateTable
from zerolite.optim.rules import Rule
from zerolite.optim.skipped_steps import non_finite_units, report_skipped
from zerolite.optim.step_settings import StepSettings
from zerolite.runtime import trace
from zerolite.shards.bucket import Bucket
from zerolite.shards.update import Update


class StepKey(NamedTuple):
    """Elements of equal keys are stepped together."""

    group: int  # in param_groups
    step: int  # this step's number for the parameter, from 1
    slot: int  # where the rule works a parameter at a time, else 0
    scale: float  # of the gradient, by hand: engine/grad_handles.py, [Note: scales]


class Work(NamedTuple):
    """What one step does to one bucket; `keys`, a slot each, are the same on every rank, `updates` are this rank's."""

    bucket: Bucket
    keys: list[StepKey | None]
    updates: list[Update]


class ShardedOptimizer(torch.optim.Optimizer):
    """Base of AdamW, Adam, Lamb and Lion.

    Collective: `step`, `clip_grad_norm_` and, where gradients wait for their reduction, `zero_grad`. All else reads or
    writes this rank's own states.

    params: parameters or param groups of one model that `zerolite.shard` has sharded.
    max_grad_norm: clip the global norm in `step`; None: do not.
    """

    steps_shards = True  # see engine/foreign_optimizers.py
    rule: Rule  # set by the subclass
    state: defaultdict[Any, Any]
    _engine: Engine  # of the parameters

    def __init__(self, params, defaults: dict, max_grad_norm: float | None = None):
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm is a positive number, or None not to clip; got {max_grad_norm}")
        self.max_grad_norm = max_grad_norm
        self.step_was_skipped = False
        self.skipped_units: list[str] = []  # whose gradients held Inf or NaN in the last step
        self._groups = Groups()
        self._table = StateTable(self.rule.state_names)
        self._stats: tuple[tuple[int, int], GradStats] | None = None  # unscaled, with what they are of
        self._grad_norm: float | None = None
        self._settings = StepSettings(self)
        super().__init__(params, defaults)

    def __reduce__(self):
        raise ZeroliteError(
            f"{type(self).__name__} steps the shards of one model and cannot be copied or pickled: take "
            "optimizer.state_dict(), or build one on another model that zerolite.shard has sharded"
        )

    # Param groups and states #

    def add_param_group(self, param_group: dict) -> None:
        """As torch's. ValueError as `Groups.read`: for its numbers and options, and for what is not sharded."""
        super().add_param_group(param_group)
        try:
            self._follow_groups()
        except Exception:
            self.param_groups.pop()
            raise

    def _follow_groups(self) -> None:
        """Step the parameters that are in `param_groups` now. ValueError as `add_param_group`."""
        check_options(self.param_groups, self.rule.is_decoupled)
        if self._groups.are(self.param_groups):
            return
        before, now = self._groups.infos, self._groups.read(self.param_groups)
        if now.engine is not None:
            self._engine = now.engine
        self._check_host_memory({info.bucket for info in now.infos.values()} - self._table.buckets.keys())
        for parameter in before:
            if parameter not in now.infos:
                self._table.remove(parameter)
        for parameter in now.infos:
            if parameter not in before:
                self._table.add(parameter, self.state)
        self._groups, self._stats = now, None

    def _check_host_memory(self, buckets: Iterable[Bucket]) -> None:
        """ZeroliteError where new states need more host memory than there is."""
        needed = sum(bucket.shard.state_bytes(self.rule.state_names) for bucket in buckets)
        if needed > 0:
            self._engine.placement.check_memory(needed, f"{type(self).__name__}'s states")

    def is_stepped(self, parameter: torch.nn.Parameter) -> bool:
        """Whether the parameter is one of this optimizer's and not frozen."""
        return parameter in self._groups.infos

    def state_dict(self) -> dict[str, Any]:
        """As torch's; states that workers hold are decoded, for reading. Waits for the workers. Not collective."""
        self._follow_groups()
        self._table.absorb(self.state)
        live: defaultdict[Any, Any] = self.state
        grouped = {parameter for group in self.param_groups for parameter in group["params"]}
        self.state = defaultdict(dict)
        for key, state in live.items():
            if not isinstance(key, torch.Tensor) or key in grouped:
                self.state[key] = dict(state) if isinstance(state, dict) else state
        try:
            return super().state_dict()
        finally:
            self.state = live
            self._table.absorb(live)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` of the same layout (stage and world size) gave; `zerolite.load` takes any other.

        States hold this rank's range only, of 16-bit parameters with the fp32 "master". Where unsharded parameters
        stay, the model's own state dict brings the ranges of the other ranks. A parameter without states starts anew.
        Not collective.
        ValueError, and no change, for param groups of other sizes or with options that zerolite has not, and for
        states that are missing, or of other shapes.
        """
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        self._follow_groups()
        state = self._table.state_of(state_dict, self.param_groups)
        check_options(state_dict["param_groups"], self.rule.is_decoupled)
        for group, saved_group in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: deepcopy(value) for key, value in saved_group.items() if key != "params"})
        self._table.absorb(state)
        self.state = state
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def read_state(self, bucket: Bucket, name: str) -> torch.Tensor:
        """One state of a bucket, 1D, this rank's range; give changed values to `write_state`. Waits for the workers."""
        self._table.absorb(self.state)
        return self._table.buckets[bucket].states.read(name)

    def write_state(self, bucket: Bucket, name: str, values: torch.Tensor) -> None:
        """Store values that `read_state` gave and somebody changed. Waits for the workers."""
        self._table.absorb(self.state)
        self._table.buckets[bucket].states.write(name, values)

    def resident_states(self, bucket: Bucket) -> Iterable[torch.Tensor]:
        """The states of a bucket that lie in this process as plain tensors, 1D, this rank's range."""
        buckets = self._table.buckets
        return buckets[bucket].states.resident().values() if bucket in buckets else ()

    def describe(self) -> dict[str, Any]:
        """Class, param groups by parameter name, and steps taken, as JSON values."""
        groups = [_description(group) for group in self.param_groups]
        self._table.absorb(self.state)
        steps = {_name(parameter): int(self._table.steps[parameter]) for parameter in self._groups.infos}
        return {"class": type(self).__name__, "groups": groups, "steps": steps}

    def set_steps(self, steps: dict[str, int]) -> None:
        """Set how many steps each parameter has taken, by name."""
        self._table.absorb(self.state)
        for parameter in self._groups.infos:
            self._table.steps[parameter].fill_(steps[_name(parameter)])

    # Gradients #

    @property
    def grad_norm(self) -> float | None:
        """Global norm of the last step's gradients before clipping, the same on every rank; None before a step.

        Before clipping by hand, too: of gradients as they were when somebody asked for a norm first.
        """
        return self._grad_norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the optimizer's parameters."""
        self._engine.clear_gradients(set_to_none, self._groups.slots())

    def clip_grad_norm_(self, max_norm: float) -> float:
        """Scale the gradients to a global norm of at most `max_norm`; returns the norm before. Collective.

        As torch.nn.utils.clip_grad_norm_, which works, too: a second clip, `max_grad_norm` included, sees the clipped
        norm. WorkerError where a worker failed.
        """
        stats, before = self._reduce_grad_stats()
        norm, self._grad_norm = self._unscaled_norm(stats), self._unscaled_norm(before)
        self._engine.handles.remember_scales()
        self._engine.handles.scale(self._groups.slots(), _clip_factor(norm, max_norm))
        self._settings.clipped_to = float(max_norm)
        return norm

    def _reduce_grad_stats(self) -> tuple[GradStats, GradStats]:
        """Of the gradients as they are, and as they were before somebody clipped them by hand. Collective."""
        reducer, handles, infos = self._engine.reducer, self._engine.handles, self._groups.infos
        handles.check()
        counts = [[True if p in infos else None for p in b.parameters.tensors] for b in reducer.order]
        if self._stats is None or self._stats[0] != (reducer.version, handles.num_scalings_by_hand):
            stats = reduce_grad_stats(self._engine, counts, self._settings)  # it may reduce, which is a new version
            self._stats = ((reducer.version, handles.num_scalings_by_hand), stats)
        found = handles.scaled(self._stats[1], counts), handles.scaled_before_clip(self._stats[1], counts)
        return over_stages(self._engine, *found) if self._engine.mesh.pipeline else found

    def _unscaled_norm(self, stats: GradStats) -> float:
        return stats.norm / (self._engine.loss_scale.value if self._engine.loss_scale is not None else 1.0)

    # Step #

    @torch.no_grad()
    def step(self, closure=None):
        """One update of this rank's range, and its publication. Returns the closure's loss. Collective.

        A step whose gradients hold Inf or NaN changes nothing on any rank; `step_was_skipped` and `skipped_units` tell.
        WorkerError where a worker failed. ZeroliteError where ranks have run other modules or their optimizers differ,
        where fp16 gradients overflow at the lowest loss scale, 1, and in a hook of a backward.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with trace.phase("optimizer step", type(self).__name__):
            self._step()
        return loss

    def _step(self) -> None:
        engine = self._engine
        engine.before_step()
        self._follow_groups()
        self._table.absorb(self.state)
        stats, before = self._reduce_grad_stats()
        loss_scale = engine.loss_scale
        norm = self._unscaled_norm(stats)
        self._grad_norm = self._unscaled_norm(before)
        self.step_was_skipped = not stats.is_finite
        self.skipped_units = non_finite_units(engine, stats) if self.step_was_skipped else []
        if self.step_was_skipped:
            report_skipped(self.skipped_units, loss_scale, self.zero_grad)
        else:
            factor = _clip_factor(norm, self.max_grad_norm) if self.max_grad_norm is not None else 1.0
            self._update(stats, factor / (loss_scale.value if loss_scale is not None else 1.0))
        if loss_scale is not None:
            loss_scale.update(overflowed=self.step_was_skipped)
            self._stats = None  # the norm was of gradients under the old scale

    def _update(self, stats: GradStats, multiplier: float) -> None:
        """Step the used slots of every bucket on gradients times `multiplier`, first units first, and publish."""
        used: dict[Bucket, list[bool]] = dict(zip(self._engine.reducer.order, stats.was_used, strict=True))
        buckets = [bucket for unit in self._engine.units for bucket in unit.buckets if bucket in self._table.buckets]
        work = [self._plan(bucket, used[bucket], multiplier) for bucket in buckets]
        self._prepare(work)
        for bucket, keys, updates in sorted(work, key=lambda item: not item.bucket.shard.steps_in_background):
            if any(keys):
                with trace.phase(bucket.shard.step_kind, bucket.unit.name):
                    bucket.shard.step(self.rule, self._table.buckets[bucket].states, updates)
                bucket.shard.publish()
        for bucket in buckets:
            bucket.parameters.wait()

    def _plan(self, bucket: Bucket, was_used: Sequence[bool], multiplier: float) -> Work:
        """Count the used slots' steps, and cut this rank's range into segments that are stepped alike."""
        keys: list[StepKey | None] = []
        scales = self._engine.handles.scales_of(bucket)
        for index, (parameter, is_used) in enumerate(zip(bucket.parameters.tensors, was_used, strict=True)):
            if parameter not in self._groups.infos or not is_used:
                keys.append(None)
                continue
            step = self._table.steps[parameter].add_(1)
            slot = index if self.rule.is_per_parameter else 0
            keys.append(StepKey(self._groups.group_of[parameter], int(step), slot, scales[index]))
        updates = []
        for segment, (group, step, slot, scale) in bucket.layout.segments(bucket.shard.range, keys):
            seed = step << 24 | bucket.position  # of stochastic rounding: the same on every rank and after a resume
            updates.append(Update(segment, self.param_groups[group], step, multiplier * scale, seed, slot))
        return Work(bucket, keys, updates)

    def _prepare(self, work: list[Work]) -> None:
        """What a rule must know of all buckets before it steps the first."""


def _description(group: dict[str, Any]) -> dict[str, Any]:
    hyper = {name: _as_number(value) for name, value in group.items() if name not in ("params", "param_names")}
    return {**hyper, "params": [_name(parameter) for parameter in group["params"]]}


def _as_number(value):
    """A hyperparameter as JSON has it: torch.optim takes 0-dim tensors for numbers."""
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value


def _name(parameter: torch.Tensor) -> str:
    return sharded_info(parameter).name


def _clip_factor(norm: float, max_norm: float) -> float:
    """torch.nn.utils.clip_grad_norm_'s factor."""
    return min(1.0, max_norm / (norm + 1e-6))
