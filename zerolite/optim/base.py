"""A torch.optim.Optimizer whose states cover only the range of each parameter that this rank owns.

`step`, phase by phase:
1. agree    one small all-gather gives every rank the global norm, whether it is finite, and which parameters were used;
2. decide   a norm that is not finite skips the step on every rank; else the clip factor, with the loss scale taken out;
3. update   the rule runs over the owned range, a run of equal hyperparameters and step count at a time;
4. publish  ranks that hold full parameters exchange their ranges, a bucket's exchange behind the next one's update.

What is offloaded is handed to the workers in phase 3, before the rest is updated here, and `step` returns without
waiting for it: parameters come back when somebody needs them (zero.py, [Note: just-in-time return]).
"""

import math
import warnings
from typing import NamedTuple

import torch
from zerolite_kernels.cpu.command import STEP

from zerolite.offload.states import State
from zerolite.optim.grad_stats import Verdict, agree
from zerolite.optim.offloaded_states import Held
from zerolite.optim.rules import Rule, Run
from zerolite.shards import layout


class Key(NamedTuple):
    """Elements of equal keys are stepped together."""

    group: int  # in param_groups
    step: int  # this step's number for the parameter, from 1
    index: int | None  # the slot, where the rule works a parameter at a time


class ShardedOptimizer(torch.optim.Optimizer):
    """Base of AdamW, Adam, Lamb and Lion; every method but the properties is collective.

    params: parameters or param groups of one model that `zerolite.shard` has sharded.
    max_grad_norm: clip the global norm in `step`; None: do not.
    """

    rule: Rule  # set by the subclass

    def __init__(self, params, defaults: dict, max_grad_norm: float | None = None):
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm is a positive number, or None not to clip; got {max_grad_norm}")
        self.max_grad_norm = max_grad_norm
        self.step_was_skipped = False
        self._zero = None
        self.places: dict[torch.nn.Parameter, tuple[object, int]] = {}  # parameter -> (bucket, slot index)
        self._group_of: dict[torch.nn.Parameter, int] = {}
        # bucket -> state name -> 1D, the owned range
        self._states: dict[object, dict[str, torch.Tensor]] = {}
        self._host_states: dict[object, dict[str, State]] = {}  # of buckets that workers step
        self._verdict: tuple[int, Verdict] | None = None  # with the gradient version that it was taken of
        self._clip_factor = 1.0  # of clip_grad_norm_, for the next step
        super().__init__(params, defaults)

    # Param groups and states #

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        group_index = len(self.param_groups) - 1
        parameters = self.param_groups[-1]["params"]
        self._check_host_memory(parameters)
        for parameter in parameters:
            self._adopt(parameter, group_index)

    def _check_host_memory(self, parameters) -> None:
        places = [parameter._zerolite_place for parameter in parameters if hasattr(parameter, "_zerolite_place")]
        new = {bucket for _, bucket, _ in places if bucket.flat.is_on_host and bucket not in self._host_states}
        hosts = [bucket.flat.host for bucket in new]
        if hosts:
            needed = sum(host.state_bytes(self.rule.state_names) for host in hosts) - hosts[0].host.free_bytes
            hosts[0].host.check_memory(max(needed, 0), f"{type(self).__name__}'s states")

    def _adopt(self, parameter: torch.nn.Parameter, group_index: int) -> None:
        place = getattr(parameter, "_zerolite_place", None)
        shape = tuple(parameter.shape)
        if place is None:
            raise ValueError(
                f"a parameter of shape {shape} belongs to no sharded model: call zerolite.shard(model, stage=...) "
                "first, then build the optimizer from model.parameters()"
            )
        zero, bucket, index = place
        if self._zero is not None and zero is not self._zero:
            raise ValueError("the parameters belong to two sharded models: build one optimizer for each")
        self._zero = zero
        if bucket.gradients is None:
            if not parameter.requires_grad:
                self._group_of[parameter] = group_index  # frozen: in its group as in torch, and never stepped
                return
            raise ValueError(
                f"{bucket.layout.slots[index].name} was frozen when the model was sharded and requires a gradient now: "
                "set requires_grad before zerolite.shard"
            )
        self.places[parameter] = (bucket, index)
        self._group_of[parameter] = group_index
        flat = bucket.flat
        if bucket not in self._states:
            self._states[bucket] = {}
            if flat.is_on_host:
                self._host_states[bucket] = flat.host.make_states(self.rule.state_names)
            else:
                stepped = flat.values()
                self._states[bucket] = {name: torch.zeros_like(stepped) for name in self.rule.state_names}
        held = {**self._states[bucket], **({} if flat.master is None else {"master": flat.master})}
        mine = {name: self.slice_of(parameter, values) for name, values in held.items()}
        self.state[parameter] = {"step": torch.tensor(0.0), **mine}

    def slice_of(self, parameter: torch.nn.Parameter, values: torch.Tensor) -> torch.Tensor:
        """A parameter's part of an owned range: in its shape where all of it is here, else 1D."""
        bucket, index = self.places[parameter]
        slot, flat = bucket.layout.slots[index], bucket.flat
        first, last = bucket.layout.overlap(slot, flat.start, flat.stop)
        mine = values[first - flat.start : last - flat.start]
        return mine.view(slot.shape) if last - first == slot.numel else mine

    def state_dict(self) -> dict:
        """As torch's; states that workers hold are decoded, for reading. Waits for the workers. Not collective."""
        packed = super().state_dict()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        held = Held(self)
        packed["state"] = {
            index: {**state, **held.of(parameters[index])} if index < len(parameters) else state
            for index, state in packed["state"].items()
        }
        return packed

    def load_state_dict(self, state_dict: dict) -> None:
        """Load what `state_dict` of the same layout (stage and world size) gave; `zerolite.load` takes any other.

        States hold this rank's range only, of 16-bit parameters with the fp32 "master". Where full parameters stay, the
        model's own state dict brings the ranges of the other ranks.
        """
        saved = dict(state_dict["state"])
        groups = state_dict["param_groups"]
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in self.param_groups]:
            raise ValueError("loaded state_dict has param groups of other sizes than this optimizer's")
        self._zero.settle()
        held = Held(self)
        for group, saved_group in zip(self.param_groups, groups, strict=True):
            for parameter, identity in zip(group["params"], saved_group["params"], strict=True):
                for name, value in {**self.state.get(parameter, {}), **held.of(parameter)}.items():
                    loaded = saved[identity][name]
                    if loaded.shape != value.shape:
                        raise ValueError(
                            f"{name} of {self._name(parameter)} has shape {tuple(loaded.shape)} in the state_dict and "
                            f"{tuple(value.shape)} here: it was saved at another stage or world size; "
                            "use zerolite.save and zerolite.load"
                        )
                    value.copy_(loaded)
                if parameter in self.places:
                    self.places[parameter][0].flat.refresh_from_master()
            group.update({key: value for key, value in saved_group.items() if key != "params"})
        held.write_back()

    def _name(self, parameter: torch.nn.Parameter) -> str:
        _, bucket, index = parameter._zerolite_place
        return bucket.layout.slots[index].name

    def states_of(self, bucket) -> dict[str, torch.Tensor]:
        """The states of a bucket that lie here: name -> 1D, the owned range; none where workers step it."""
        return self._states.get(bucket, {})

    def read_state(self, bucket, name: str) -> torch.Tensor:
        """One state of a bucket, 1D, the owned range: the memory itself, but where the host encodes it.

        Give changed values to `write_state`. Waits for the workers.
        """
        if bucket not in self._host_states:
            return self._states[bucket][name]
        bucket.flat.host.wait()
        return self._host_states[bucket][name].read()

    def write_state(self, bucket, name: str, values: torch.Tensor) -> None:
        """Take values that `read_state` gave and somebody changed."""
        if bucket in self._host_states:
            flat = bucket.flat
            for start, stop in bucket.layout.gaps():  # what padding was left with would spoil a block's scale
                low, high = max(start, flat.start), min(stop, flat.stop)
                values[low - flat.start : max(low, high) - flat.start].zero_()
            flat.host.wait()
            self._host_states[bucket][name].write(values)

    def describe(self) -> dict:
        """Class, param groups by parameter name, and steps taken, as JSON values."""
        groups = []
        for group in self.param_groups:
            hyper = {name: value for name, value in group.items() if name not in ("params", "param_names")}
            groups.append({**hyper, "params": [self._name(parameter) for parameter in group["params"]]})
        steps = {self._name(parameter): int(state["step"]) for parameter, state in self.state.items()}
        return {"class": type(self).__name__, "groups": groups, "steps": steps}

    def set_steps(self, steps: dict[str, int]) -> None:
        """Set how many steps each parameter has taken, by name."""
        for parameter, state in self.state.items():
            state["step"].fill_(steps[self._name(parameter)])

    # Gradients #

    @property
    def grad_norm(self) -> float | None:
        """Global norm of the last step's gradients before clipping, the same on every rank; None before a step."""
        return self._grad_norm

    _grad_norm: float | None = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of the optimizer's parameters."""
        slots: dict[object, list[int]] = {}
        for bucket, index in self.places.values():
            slots.setdefault(bucket, []).append(index)
        self._zero.clear_gradients(set_to_none, slots)
        self._clip_factor = 1.0

    def clip_grad_norm_(self, max_norm: float) -> float:
        """Have the next step clip the global norm to `max_norm`; returns the norm before clipping."""
        self._zero.settle()
        norm = self._unscaled_norm(self._agree())
        self._clip_factor = _clip_factor(norm, max_norm)
        self._grad_norm = norm
        return norm

    def _agree(self) -> Verdict:
        if self._verdict is None or self._verdict[0] != self._zero.gradient_version:
            keys = [[True if p in self.places else None for p in b.flat.parameters] for b in self._zero.reduction_order]
            verdict = agree(self._zero, keys)  # it may reduce, which is a new version
            self._verdict = (self._zero.gradient_version, verdict)
        return self._verdict[1]

    def _unscaled_norm(self, verdict: Verdict) -> float:
        return verdict.norm / (self._zero.loss_scale.value if self._zero.loss_scale is not None else 1.0)

    # Step #

    @torch.no_grad()
    def step(self, closure=None):
        """One update of the owned range and, where full parameters stay, their exchange. Returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        zero = self._zero
        zero.before_step()
        verdict = self._agree()
        loss_scale = zero.loss_scale
        norm = self._unscaled_norm(verdict)
        self._grad_norm = norm
        self.step_was_skipped = not verdict.is_finite
        if self.step_was_skipped:
            self._say_skipped(verdict)
        else:
            factor = self._clip_factor
            if self.max_grad_norm is not None:
                factor *= _clip_factor(norm, self.max_grad_norm)
            self._update(verdict, factor / (loss_scale.value if loss_scale is not None else 1.0))
        self._clip_factor = 1.0
        if loss_scale is not None:
            loss_scale.update(overflowed=self.step_was_skipped)
            self._verdict = None  # the norm was of gradients under the old scale
        return loss

    def _say_skipped(self, verdict: Verdict) -> None:
        if self._zero.loss_scale is not None:
            return  # an overflow is how a loss scale finds its height; step_was_skipped tells
        buckets = zip(self._zero.reduction_order, verdict.squares, strict=True)
        names = sorted({bucket.unit.name for bucket, squares in buckets if not math.isfinite(squares)})
        warnings.warn(
            f"step skipped on every rank, nothing changed: gradients of {', '.join(names[:4])}"
            f"{' and others' if len(names) > 4 else ''} hold Inf or NaN",
            stacklevel=3,
        )

    def _update(self, verdict: Verdict, multiplier: float) -> None:
        """Step the used slots of every bucket on gradients times `multiplier`, first units first."""
        used = dict(zip(self._zero.reduction_order, verdict.was_used, strict=True))
        buckets = [bucket for unit in self._zero.units for bucket in unit.buckets if bucket in self._states]
        work = [(bucket, self._count_up(bucket, used[bucket])) for bucket in buckets]
        self._prepare(work, multiplier)
        away = [(bucket, keys) for bucket, keys in work if bucket.flat.is_on_host and any(keys)]
        for bucket, keys in away:
            self._step_on_host(bucket, keys, multiplier)
        self._zero.send_away([bucket for bucket, _ in away])
        work = [(bucket, keys) for bucket, keys in work if not bucket.flat.is_on_host]
        for bucket, keys in work:
            for chunk in self._chunks(bucket, keys):
                self._step_chunk(bucket, chunk, multiplier)
            bucket.flat.refresh_from_master()
            bucket.flat.republish()
        for bucket, _ in work:
            bucket.flat.wait()

    def _count_up(self, bucket, was_used: list[bool]) -> list[Key | None]:
        """Count the used slots' steps; a slot's key, None where it is not stepped."""
        keys: list[Key | None] = []
        for index, (parameter, is_used) in enumerate(zip(bucket.flat.parameters, was_used, strict=True)):
            if parameter not in self.places or not is_used or not parameter.requires_grad:
                keys.append(None)
                continue
            state = self.state[parameter]
            state["step"] += 1
            keys.append(
                Key(self._group_of[parameter], int(state["step"]), index if self.rule.is_per_parameter else None)
            )
        return keys

    def _prepare(self, work: list, multiplier: float) -> None:
        """What a rule must know of all buckets before it steps the first."""

    def _step_on_host(self, bucket, keys: list[Key | None], multiplier: float) -> None:
        """Hand one bucket's runs to the workers."""
        host, held, states = bucket.flat.host, bucket.gradients.on_host(), self._host_states[bucket]
        bucket.flat.finish_ascent()
        commands = [
            host.command(
                STEP, run, held, states, **self._numbers(bucket, run.key, multiplier), **self._extra(bucket, run.key)
            )
            for run in bucket.layout.runs(bucket.flat.start, bucket.flat.stop, keys)
        ]
        host.submit(commands, "stepping")

    def _numbers(self, bucket, key: Key, multiplier: float) -> dict[str, float]:
        seed = key.step << 24 | bucket.position  # of stochastic rounding: the same on every rank and after a resume
        return {**self.rule.numbers(self.param_groups[key.group], key.step, multiplier), "seed": seed}

    def _extra(self, bucket, key: Key) -> dict[str, float]:
        """What the rule's step takes beside a run."""
        return {}

    def _step_chunk(self, bucket, chunk: layout.Run, multiplier: float) -> None:
        self.rule.step(self._run(bucket, chunk, multiplier), **self._extra(bucket, chunk.key))

    def _chunks(self, bucket, keys: list[Key | None]):
        """The owned range as runs of one key, cut where the scratch that a run needs would be large."""
        flat = bucket.flat
        for run in bucket.layout.runs(flat.start, flat.stop, keys):
            chunk_numel = self._zero.device.chunk_numel
            if self._run(bucket, run, 1.0).is_native:
                chunk_numel = run.stop - run.start  # one pass, no scratch
            for start in range(run.start, run.stop, chunk_numel):
                yield layout.Run(start, min(start + chunk_numel, run.stop), run.key)

    def _run(self, bucket, chunk: layout.Run, multiplier: float) -> Run:
        flat = bucket.flat
        mine = slice(chunk.start - flat.start, chunk.stop - flat.start)
        states = {name: values[mine] for name, values in self._states[bucket].items()}
        return Run(
            flat.values()[mine],
            bucket.gradients.require()[mine],
            states,
            chunk.key.step,
            self.param_groups[chunk.key.group],
            multiplier,
            chunk.start % bucket.layout.piece_numel,
        )


def _clip_factor(norm: float, max_norm: float) -> float:
    """torch.nn.utils.clip_grad_norm_'s factor."""
    return min(1.0, max_norm / (norm + 1e-6))
