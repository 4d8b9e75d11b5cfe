"""`optimizer.state`, as torch has it: a dict of tensors a parameter, which anybody may read, change, empty or replace.

States lie a bucket at a time, on the device or with the workers. A `ParameterStates` shows one parameter's part of
them. A `StateTable` finds out what was done to those dicts, and does it to the buckets, before these are read:

    state[p]["exp_avg"].zero_()           this is the bucket's own memory, or is written back
    state[p]["exp_avg"] = tensor          its values are copied
    state[p] = {}   del state[p]          the parameter starts anew: zeros and step 0, as in torch
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from operator import is_
from typing import Any

import torch

from zerolite.engine.engine import ParameterInfo, sharded_info
from zerolite.shards.bucket import Bucket
from zerolite.shards.shard import ShardStates


class ParameterStates(dict):
    """One parameter's states: this rank's range, in the parameter's shape where all of it is here, else 1D.

    States that do not lie in this process are read when somebody asks, which waits for the workers; what is changed in
    them counts from the next step on.
    """

    def __init__(
        self,
        shown: Mapping[str, Any],
        absent: Iterable[str],
        touch: Callable[[], None],
        read: Callable[[], Mapping[str, torch.Tensor]],
    ):
        """absent: states that lie elsewhere, which `read` gives. touch: called where the dict may now differ."""
        super().__init__(shown)
        self.shown = dict(shown)  # what the table has put here
        self._absent, self._touch, self._read = set(absent), touch, read

    def _fetch(self) -> None:
        absent, self._absent = self._absent, set()
        if absent:
            self._touch()
            values = self._read()
            self.shown |= {name: values[name] for name in absent}
            super().update({name: values[name] for name in absent})

    def __getitem__(self, name: str) -> Any:
        if name in self._absent:
            self._fetch()
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in self._absent

    def __len__(self) -> int:
        return super().__len__() + len(self._absent)

    def __iter__(self) -> Iterator[str]:
        self._fetch()
        return super().__iter__()

    def keys(self):
        self._fetch()
        return super().keys()

    def values(self):
        self._fetch()
        return super().values()

    def items(self):
        self._fetch()
        return super().items()

    def __repr__(self) -> str:
        return repr(self.copy())

    def copy(self) -> dict[str, Any]:
        return dict(self.items())

    def __reduce__(self):
        return dict, (self.copy(),)  # a copy is a plain dict

    def __setitem__(self, name: str, value: Any) -> None:
        self._touch()
        self._absent.discard(name)
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        self._touch()
        self._fetch()
        super().__delitem__(name)

    def update(self, *others: Any, **values: Any) -> None:
        for name, value in dict(*others, **values).items():
            self[name] = value

    def __ior__(self, other: Any):  # type: ignore[misc]
        self.update(other)
        return self

    def setdefault(self, name: str, default: Any = None) -> Any:
        if name not in self:
            self[name] = default
        return self[name]

    def pop(self, name: str, *default: Any) -> Any:
        if name not in self and default:
            return default[0]
        value = self[name]
        del self[name]
        return value

    def popitem(self) -> tuple[str, Any]:
        name = list(self)[-1]
        return name, self.pop(name)

    def clear(self) -> None:
        self._touch()
        self._absent = set()
        super().clear()


class BucketStates:
    """What an optimizer keeps of one bucket: the rule's states, and the master that its shard has beside the values."""

    def __init__(self, bucket: Bucket, names: tuple[str, ...]):
        self.bucket, self.names = bucket, names
        self.states: ShardStates = bucket.shard.new_states(names)
        spec = bucket.shard.spec
        self.has_master = spec.stepped_dtype != spec.dtype
        self._read: dict[str, torch.Tensor] = {}  # what `read` gave since the last `write_back`
        self._versions: dict[str, int] = {}

    def resident(self) -> dict[str, torch.Tensor]:
        """1D, the owned range: what lies in this process as plain tensors."""
        resident = dict(self.states.resident())
        master = self.bucket.shard.resident_master()
        return resident if master is None else {**resident, "master": master}

    def absent(self) -> set[str]:
        """Names of what lies elsewhere."""
        names = {*self.names, "master"} if self.has_master else set(self.names)
        return names - self.resident().keys()

    def read(self) -> dict[str, torch.Tensor]:
        """1D, the owned range: all there is. What is changed in it counts after `write_back`. Waits for the workers."""
        if not self._read:
            self._read = {name: self.states.read(name) for name in self.names}
            if self.has_master:
                self._read["master"] = self.bucket.shard.values()
            self._versions = {name: values._version for name, values in self._read.items()}
        return self._read

    def write_back(self) -> None:
        """Store what was changed in the tensors that `read` gave; they are the states no longer."""
        read, self._read = self._read, {}
        for name, values in read.items():
            if values._version == self._versions[name]:
                continue
            if name == "master":
                self.bucket.shard.set_values(values)
            else:
                self.states.write(name, values)


class StateTable:
    """The states of one optimizer's parameters, by bucket, and what `optimizer.state` was last given of them."""

    def __init__(self, names: tuple[str, ...]):
        self.names = names  # of the rule's states
        self.buckets: dict[Bucket, BucketStates] = {}
        self.steps: dict[torch.nn.Parameter, torch.Tensor] = {}  # () fp32: how many a parameter has taken
        self._shown: dict[torch.nn.Parameter, ParameterStates] = {}
        self._is_touched = False  # whether somebody changed a dict, or holds states that lie elsewhere

    def add(self, parameter: torch.nn.Parameter, state: MutableMapping) -> None:
        """Show a parameter's states in `state`: new ones, or, where `state` has kept them, as `remove` left them."""
        bucket = sharded_info(parameter).bucket
        if bucket not in self.buckets:
            self.buckets[bucket] = BucketStates(bucket, self.names)
        kept = dict.copy(state[parameter]) if state.get(parameter) else {}
        if parameter in self.steps and not kept:
            self._write(parameter, dict.fromkeys(self.names, 0.0))
            self.buckets[bucket].write_back()
        self._show(parameter, state, {"step": torch.tensor(0.0), **kept})

    def remove(self, parameter: torch.nn.Parameter) -> None:
        """Follow what is done to the parameter's states no longer; they stay as they are."""
        del self._shown[parameter]

    def absorb(self, state: MutableMapping) -> None:
        """Do to the buckets what was done to `state` since it was shown. Waits for the workers where there is any.

        ValueError, and no change, for states that are incomplete, of another shape, or no tensors.
        """
        shown = self._shown.values()
        is_same = len(state) == len(shown) and all(map(is_, state.values(), shown))
        if not self._is_touched and (is_same or all(map(is_, map(state.get, self._shown), shown))):
            return
        changes = {parameter: self.changes(parameter, state.get(parameter)) for parameter in self._shown}
        for parameter, changed in changes.items():
            self._write(parameter, changed)
        for bucket_states in self.buckets.values():
            bucket_states.write_back()
        known = {*self.names, "master"}
        for parameter in changes:
            now = state.pop(parameter, None) or {}  # popped: the order is that of `_shown` again
            plain = {name: value for name, value in dict.items(now) if name not in known}
            step = changes[parameter].get("step", plain.get("step"))
            self._show(parameter, state, {**plain, "step": torch.as_tensor(step, dtype=torch.float32).cpu()})
        self._is_touched = False

    def changes(self, parameter: torch.nn.Parameter, now: Mapping[str, Any] | None) -> dict[str, Any]:
        """What of `now`, which stands for the parameter's states, is another thing than was shown.

        ValueError where it cannot be taken.
        """
        info = sharded_info(parameter)
        if not now:
            return {"step": 0.0, **dict.fromkeys(self.names, 0.0)}
        missing = [name for name in ("step", *self.names) if name not in now]
        if missing:
            raise ValueError(
                f"the state of {info.name} has no {' and no '.join(missing)}, only {', '.join(map(str, now))}: "
                "give all of them, or an empty dict, which starts the parameter anew"
            )
        shown = self._shown[parameter].shown
        changed = {}
        for name in ("step", *self.names, "master"):
            value = dict.get(now, name) if isinstance(now, dict) else now.get(name)
            if value is None or value is shown.get(name):
                continue
            changed[name] = _step_of(info, value) if name == "step" else _tensor_of(info, name, value)
        return changed

    def state_of(self, state_dict: Mapping[str, Any], param_groups: Sequence[dict[str, Any]]) -> defaultdict[Any, Any]:
        """What `optimizer.state` would be after loading a state dict. ValueError where that does not fit."""
        groups = state_dict["param_groups"]
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in param_groups]:
            raise ValueError("loaded state_dict has param groups of other sizes than this optimizer's")
        state: defaultdict[Any, Any] = defaultdict(dict, state_dict["state"])
        for group, saved_group in zip(param_groups, groups, strict=True):
            for parameter, identity in zip(group["params"], saved_group["params"], strict=True):
                saved = state.pop(identity, {})
                if parameter in self._shown:
                    self.changes(parameter, saved)
                    state[parameter] = dict(saved)
        return state

    def _write(self, parameter: torch.nn.Parameter, changed: Mapping[str, Any]) -> None:
        info = sharded_info(parameter)
        bucket_states = self.buckets[info.bucket]
        resident = bucket_states.resident()
        for name, value in changed.items():
            if name == "step" or (name == "master" and not bucket_states.has_master):
                continue
            own = slice_of(info, (resident if name in resident else bucket_states.read())[name])
            if isinstance(value, torch.Tensor):
                own.copy_(value)
            else:
                own.fill_(value)

    def _show(self, parameter: torch.nn.Parameter, state: MutableMapping, plain: Mapping[str, Any]) -> None:
        info = sharded_info(parameter)
        bucket_states = self.buckets[info.bucket]
        tensors = {name: slice_of(info, values) for name, values in bucket_states.resident().items()}

        def touch() -> None:
            self._is_touched = True

        def read() -> dict[str, torch.Tensor]:
            return {name: slice_of(info, values) for name, values in bucket_states.read().items()}

        shown = ParameterStates({**plain, **tensors}, bucket_states.absent(), touch, read)
        self._shown[parameter] = state[parameter] = shown
        self.steps[parameter] = shown.shown["step"]


def slice_of(info: ParameterInfo, values: torch.Tensor) -> torch.Tensor:
    """A parameter's part of a range that this rank owns: in its shape where all of it is here, else 1D."""
    slot, owned = info.bucket.layout.slots[info.index], info.bucket.shard.range
    part = slot.range.intersect(owned)
    own = part.of(values, owned)
    return own.view(slot.shape) if part.numel == slot.numel else own


def _tensor_of(info: ParameterInfo, name: str, value: Any) -> torch.Tensor:
    slot = info.bucket.layout.slots[info.index]
    numel = slot.range.intersect(info.bucket.shard.range).numel
    shape = tuple(slot.shape) if numel == slot.numel else (numel,)
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name} of {info.name} is a tensor of shape {shape}, got {type(value).__name__}")
    if tuple(value.shape) != shape:
        raise ValueError(
            f"{name} of {info.name} has shape {tuple(value.shape)}, expected {shape}, this rank's range of it: states "
            "that were saved at another stage or world size come by zerolite.save and zerolite.load"
        )
    return value


def _step_of(info: ParameterInfo, value: Any) -> float:
    step = float(value)
    if not (math.isfinite(step) and step >= 0 and step == int(step)):
        raise ValueError(f"step of {info.name} is a whole number of at least 0, got {step}")
    return step
