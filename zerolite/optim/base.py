"""A torch.optim.Optimizer whose states cover only the range of each parameter that this rank owns.

`step`, phase by phase:
1. stats    one small all-gather tells every rank the global norm, whether it is finite, and which slots were used;
2. decide   a norm that is not finite skips the step on every rank; else the clip factor, less the loss scale;
3. update   each bucket's shard steps its segments, those of equal hyperparameters and step count at a time;
4. publish  ranks that hold unsharded parameters exchange their ranges, a bucket's exchange behind the next one's step.

Shards that workers step get their commands first, and `step` returns without waiting for them: parameters are fetched
when somebody needs them (offload/fetch.py, [Note: just-in-time fetch]).

What torch.optim has and this has not: sparse gradients, complex parameters, `capturable`, `differentiable`, states of
whole parameters (`state[p]` holds this rank's part).
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from zerolite.engine.engine import Engine, ParameterInfo, sharded_info
from zerolite.errors import ZeroliteError
from zerolite.optim.grad_stats import GradStats, reduce_grad_stats
from zerolite.optim.rules import Rule
from zerolite.runtime import trace
from zerolite.shards.bucket import Bucket
from zerolite.shards.shard import ShardStates
from zerolite.shards.update import Update


class StepKey(NamedTuple):
    """Elements of equal keys are stepped together."""

    group: int  # in param_groups
    step: int  # this step's number for the parameter, from 1
    slot: int  # where the rule works a parameter at a time, else 0


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

    rule: Rule  # set by the subclass
    _engine: Engine  # of the parameters

    def __init__(self, params, defaults: dict, max_grad_norm: float | None = None):
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm is a positive number, or None not to clip; got {max_grad_norm}")
        self.max_grad_norm = max_grad_norm
        self.step_was_skipped = False
        self._infos: dict[torch.nn.Parameter, ParameterInfo] = {}  # of the parameters that are stepped
        self._group_of: dict[torch.nn.Parameter, int] = {}  # of those
        self._states: dict[Bucket, ShardStates] = {}
        self._stats: tuple[int, GradStats] | None = None  # with the version of the gradients that they are of
        self._clip_factor = 1.0  # of clip_grad_norm_, for the next step
        self._grad_norm: float | None = None
        super().__init__(params, defaults)

    def __reduce__(self):
        raise ZeroliteError(
            f"{type(self).__name__} steps the shards of one model and cannot be copied or pickled: take "
            "optimizer.state_dict(), or build one on another model that zerolite.shard has sharded"
        )

    # Param groups and states #

    def add_param_group(self, param_group: dict) -> None:
        """As torch's. ValueError for parameters of no sharded model, of another one, or unfrozen after sharding."""
        super().add_param_group(param_group)
        parameters = self.param_groups[-1]["params"]
        infos = [self._check(parameter) for parameter in parameters]
        # Frozen parameters are in their group as in torch, and never stepped.
        stepped = [(p, info) for p, info in zip(parameters, infos, strict=True) if info.bucket.gradients is not None]
        self._check_host_memory({info.bucket for _, info in stepped} - self._states.keys())
        for parameter, info in stepped:
            self._infos[parameter] = info
            self._group_of[parameter] = len(self.param_groups) - 1
            self.state[parameter] = {"step": torch.tensor(0.0), **self._resident(parameter, info.bucket)}

    def _check(self, parameter: torch.nn.Parameter) -> ParameterInfo:
        info = sharded_info(parameter)
        self._engine = getattr(self, "_engine", info.engine)
        if info.engine is not self._engine:
            raise ValueError("the parameters belong to two sharded models: build one optimizer for each")
        if info.bucket.gradients is None and parameter.requires_grad:
            raise ValueError(
                f"{info.name} was frozen when the model was sharded and requires a gradient now: "
                "set requires_grad before zerolite.shard"
            )
        return info

    def _check_host_memory(self, buckets: Iterable[Bucket]) -> None:
        """ZeroliteError where new states need more host memory than there is."""
        needed = sum(bucket.shard.state_bytes(self.rule.state_names) for bucket in buckets)
        if needed > 0:
            self._engine.placement.check_memory(needed, f"{type(self).__name__}'s states")

    def _resident(self, parameter: torch.nn.Parameter, bucket: Bucket) -> dict[str, torch.Tensor]:
        """The parameter's part of the states, new if need be, and of the master, where they lie in this process."""
        if bucket not in self._states:
            self._states[bucket] = bucket.shard.new_states(self.rule.state_names)
        resident = dict(self._states[bucket].resident())
        master = bucket.shard.resident_master()
        if master is not None:
            resident["master"] = master
        return {name: slice_of(parameter, values) for name, values in resident.items()}

    def is_stepped(self, parameter: torch.nn.Parameter) -> bool:
        """Whether the parameter is one of this optimizer's and not frozen."""
        return parameter in self._infos

    def state_dict(self) -> dict[str, Any]:
        """As torch's; states that workers hold are decoded, for reading. Waits for the workers. Not collective."""
        packed = super().state_dict()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        states = _StatesByParameter(self)
        packed["state"] = {
            index: {**state, **states.of(parameters[index])} if index < len(parameters) else state
            for index, state in packed["state"].items()
        }
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` of the same layout (stage and world size) gave; `zerolite.load` takes any other.

        States hold this rank's range only, of 16-bit parameters with the fp32 "master". Where unsharded parameters
        stay, the model's own state dict brings the ranges of the other ranks. Not collective.
        ValueError for param groups of other sizes, or states of other shapes.
        """
        saved = dict(state_dict["state"])
        groups = state_dict["param_groups"]
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in self.param_groups]:
            raise ValueError("loaded state_dict has param groups of other sizes than this optimizer's")
        states = _StatesByParameter(self)
        for group, saved_group in zip(self.param_groups, groups, strict=True):
            for parameter, identity in zip(group["params"], saved_group["params"], strict=True):
                for name, value in {**self.state.get(parameter, {}), **states.of(parameter)}.items():
                    loaded = saved[identity][name]
                    if loaded.shape != value.shape:
                        raise ValueError(
                            f"{name} of {_name(parameter)} has shape {tuple(loaded.shape)} in the state_dict and "
                            f"{tuple(value.shape)} here: it was saved at another stage or world size; "
                            "use zerolite.save and zerolite.load"
                        )
                    value.copy_(loaded)
            group.update({key: value for key, value in saved_group.items() if key != "params"})
        states.write_back()

    def read_state(self, bucket: Bucket, name: str) -> torch.Tensor:
        """One state of a bucket, 1D, this rank's range; give changed values to `write_state`. Waits for the workers."""
        return self._states[bucket].read(name)

    def write_state(self, bucket: Bucket, name: str, values: torch.Tensor) -> None:
        """Store values that `read_state` gave and somebody changed. Waits for the workers."""
        self._states[bucket].write(name, values)

    def resident_states(self, bucket: Bucket) -> Iterable[torch.Tensor]:
        """The states of a bucket that lie in this process as plain tensors, 1D, this rank's range."""
        return self._states[bucket].resident().values() if bucket in self._states else ()

    def describe(self) -> dict[str, Any]:
        """Class, param groups by parameter name, and steps taken, as JSON values."""
        groups = []
        for group in self.param_groups:
            hyper = {name: value for name, value in group.items() if name not in ("params", "param_names")}
            groups.append({**hyper, "params": [_name(parameter) for parameter in group["params"]]})
        steps = {_name(parameter): int(state["step"]) for parameter, state in self.state.items()}
        return {"class": type(self).__name__, "groups": groups, "steps": steps}

    def set_steps(self, steps: dict[str, int]) -> None:
        """Set how many steps each parameter has taken, by name."""
        for parameter, state in self.state.items():
            state["step"].fill_(steps[_name(parameter)])

    # Gradients #

    @property
    def grad_norm(self) -> float | None:
        """Global norm of the last step's gradients before clipping, the same on every rank; None before a step."""
        return self._grad_norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the optimizer's parameters."""
        slots: dict[Bucket, list[int]] = {}
        for info in self._infos.values():
            slots.setdefault(info.bucket, []).append(info.index)
        self._engine.clear_gradients(set_to_none, slots)
        self._clip_factor = 1.0

    def clip_grad_norm_(self, max_norm: float) -> float:
        """Have the next step clip the global norm to `max_norm`; returns the norm before clipping. Collective.

        WorkerError where a worker failed.
        """
        norm = self._unscaled_norm(self._reduce_grad_stats())
        self._clip_factor = _clip_factor(norm, max_norm)
        self._grad_norm = norm
        return norm

    def _reduce_grad_stats(self) -> GradStats:
        reducer = self._engine.reducer
        if self._stats is None or self._stats[0] != reducer.version:
            counts = [[True if p in self._infos else None for p in b.parameters.tensors] for b in reducer.order]
            stats = reduce_grad_stats(self._engine, counts)  # it may reduce, which is a new version
            self._stats = (reducer.version, stats)
        return self._stats[1]

    def _unscaled_norm(self, stats: GradStats) -> float:
        return stats.norm / (self._engine.loss_scale.value if self._engine.loss_scale is not None else 1.0)

    # Step #

    @torch.no_grad()
    def step(self, closure=None):
        """One update of this rank's range, and its publication. Returns the closure's loss. Collective.

        A step whose gradients hold Inf or NaN changes nothing on any rank; `step_was_skipped` tells. WorkerError where
        a worker failed, ZeroliteError where ranks have run other modules.
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
        stats = self._reduce_grad_stats()
        loss_scale = engine.loss_scale
        norm = self._unscaled_norm(stats)
        self._grad_norm = norm
        self.step_was_skipped = not stats.is_finite
        if self.step_was_skipped:
            _warn_skipped(engine, stats)
        else:
            factor = self._clip_factor
            if self.max_grad_norm is not None:
                factor *= _clip_factor(norm, self.max_grad_norm)
            self._update(stats, factor / (loss_scale.value if loss_scale is not None else 1.0))
        self._clip_factor = 1.0
        if loss_scale is not None:
            loss_scale.update(overflowed=self.step_was_skipped)
            self._stats = None  # the norm was of gradients under the old scale

    def _update(self, stats: GradStats, multiplier: float) -> None:
        """Step the used slots of every bucket on gradients times `multiplier`, first units first, and publish."""
        used: dict[Bucket, list[bool]] = dict(zip(self._engine.reducer.order, stats.was_used, strict=True))
        buckets = [bucket for unit in self._engine.units for bucket in unit.buckets if bucket in self._states]
        work = [self._plan(bucket, used[bucket], multiplier) for bucket in buckets]
        self._prepare(work)
        for bucket, keys, updates in sorted(work, key=lambda item: not item.bucket.shard.steps_in_background):
            if any(keys):
                with trace.phase(bucket.shard.step_kind, bucket.unit.name):
                    bucket.shard.step(self.rule, self._states[bucket], updates)
                bucket.shard.publish()
        for bucket in buckets:
            bucket.parameters.wait()

    def _plan(self, bucket: Bucket, was_used: Sequence[bool], multiplier: float) -> Work:
        """Count the used slots' steps, and cut this rank's range into segments that are stepped alike."""
        keys: list[StepKey | None] = []
        for index, (parameter, is_used) in enumerate(zip(bucket.parameters.tensors, was_used, strict=True)):
            if parameter not in self._infos or not is_used:
                keys.append(None)
                continue
            state = self.state[parameter]
            state["step"] += 1
            slot = index if self.rule.is_per_parameter else 0
            keys.append(StepKey(self._group_of[parameter], int(state["step"]), slot))
        updates = []
        for segment, (group, step, slot) in bucket.layout.segments(bucket.shard.range, keys):
            seed = step << 24 | bucket.position  # of stochastic rounding: the same on every rank and after a resume
            updates.append(Update(segment, self.param_groups[group], step, multiplier, seed, slot))
        return Work(bucket, keys, updates)

    def _prepare(self, work: list[Work]) -> None:
        """What a rule must know of all buckets before it steps the first."""


class _StatesByParameter:
    """States and masters as a state dict has them: read once a bucket, by parameter; `write_back` stores changes."""

    def __init__(self, optimizer: ShardedOptimizer):
        self.optimizer = optimizer
        self._read: dict[Bucket, dict[str, torch.Tensor]] = {}

    def of(self, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        if not self.optimizer.is_stepped(parameter):
            return {}
        bucket = sharded_info(parameter).bucket
        if bucket not in self._read:
            states = {name: self.optimizer.read_state(bucket, name) for name in self.optimizer.rule.state_names}
            values = bucket.shard.values()
            if values.dtype != bucket.shard.spec.dtype:
                states["master"] = values
            self._read[bucket] = states
        return {name: slice_of(parameter, values) for name, values in self._read[bucket].items()}

    def write_back(self) -> None:
        for bucket, states in self._read.items():
            for name, values in states.items():
                if name == "master":
                    bucket.shard.set_values(values)
                else:
                    self.optimizer.write_state(bucket, name, values)


def _warn_skipped(engine: Engine, stats: GradStats) -> None:
    if engine.loss_scale is not None:
        return  # an overflow is how a loss scale finds its height; step_was_skipped tells
    buckets = zip(engine.reducer.order, stats.squares, strict=True)
    names = sorted({bucket.unit.name for bucket, squares in buckets if not math.isfinite(squares)})
    warnings.warn(
        f"step skipped on every rank, nothing changed: gradients of {', '.join(names[:4])}"
        f"{' and others' if len(names) > 4 else ''} hold Inf or NaN",
        stacklevel=4,
    )


def slice_of(parameter: torch.nn.Parameter, values: torch.Tensor) -> torch.Tensor:
    """A parameter's part of a range that this rank owns: in its shape where all of it is here, else 1D."""
    info = sharded_info(parameter)
    slot, owned = info.bucket.layout.slots[info.index], info.bucket.shard.range
    part = slot.range.intersect(owned)
    own = part.of(values, owned)
    return own.view(slot.shape) if part.numel == slot.numel else own


def _name(parameter: torch.Tensor) -> str:
    return sharded_info(parameter).name


def _clip_factor(norm: float, max_norm: float) -> float:
    """torch.nn.utils.clip_grad_norm_'s factor."""
    return min(1.0, max_norm / (norm + 1e-6))
