"""Whether the model's parameters are still those that the engine shards: foreign code may replace, cast or write them.

Before a forward of the root, before a step, around `full_params` and before a file is written, `check` compares: each
module and parameter is the object that was there, each parameter's address and version are those that the engine left,
and frozen ones are frozen. What changed is stored in the shard and its master, or refused by name before it is trained.

The comparison costs a few integers a parameter and no collective: every rank must have changed the same.
"""

import functools
import inspect
import warnings
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils import stateless

from zerolite.shards.bucket import Bucket, Unit
from zerolite.shards.dtensors import is_distributed, local_of

BEFORE = "do it before zerolite.shard"
WHOLE = "do it inside zerolite.full_params(model, writeback=True), on every rank"


class ParameterGuard:
    """Objects, addresses and versions of one model's parameters, as the engine left them."""

    def __init__(self, model: nn.Module, units: list[Unit]):
        self._model, self._units = model, units
        self._slots: dict[int, tuple[Bucket, int]] = {}  # by id of the parameter
        self._edges: list[tuple[dict, str, object]] = []  # a module's dict, a name in it, and what stood there
        self._owners: dict[int, list[tuple[nn.Module, str]]] = {}  # by id of the parameter
        self._dicts: list[dict] = []  # of modules and of parameters, of every module
        self._num_entries = 0  # in those

    def watch(self) -> None:
        """Compare from here on with what is there now."""
        self._edges, self._owners, self._dicts = [], {}, []
        for unit in self._units:
            for bucket in unit.buckets:
                for index, parameter in enumerate(bucket.parameters.tensors):
                    self._slots[id(parameter)] = (bucket, index)
        for module in self._model.modules():
            self._dicts += [module._modules, module._parameters]
            self._edges += [(module._modules, name, child) for name, child in module._modules.items()]
            for name, parameter in module._parameters.items():
                self._edges.append((module._parameters, name, parameter))
                self._owners.setdefault(id(parameter), []).append((module, name))
        self._num_entries = sum(map(len, self._dicts))

    @property
    def frees_parameters(self) -> bool:
        return not all(bucket.parameters.stays_unsharded for unit in self._units for bucket in unit.buckets)

    def check(self) -> None:
        """Store what foreign code changed in shards and masters.

        ValueError, with the parameter's name, for what cannot be stored.
        """
        if self._has_other_objects():
            if _is_called_on_others():
                self._expect_values_of_others()
            else:
                self._restore_objects(is_kept=True)
        for unit in self._units:
            for bucket in unit.buckets:
                if not bucket.parameters.is_intact():
                    _refuse_unfrozen(bucket)
                    _store_data(bucket)
                    _store_edits(bucket)

    def drop_edits(self) -> None:
        """At the end of `full_params` without writeback: undo what was changed in gathered copies, and say so."""
        dropped = self._restore_objects(is_kept=False) if self._has_other_objects() else []
        for unit in self._units:
            for bucket in unit.buckets:
                parameters = bucket.parameters
                if parameters.stays_unsharded or parameters.is_intact():
                    continue
                for index in parameters.rebound_slots():
                    parameters.rebind(index)
                    dropped.append(_name(bucket, index))
                dropped += [_name(bucket, index) for index in parameters.edited_slots()]
                parameters.accept_edits()
        if dropped:
            warnings.warn(
                f"full_params(writeback=False) drops what was written into {', '.join(dropped[:4])}"
                f"{' and others' if len(dropped) > 4 else ''}: pass writeback=True to keep it",
                stacklevel=5,
            )
        self.check()

    def rebind_unreadable(self) -> None:
        """What `model.to` made of NaN holds no value: bind NaN again, where dtype and device are the parameter's."""
        for unit in self._units:
            for bucket in unit.buckets:
                if not bucket.parameters.is_readable:
                    for index in bucket.parameters.rebound_slots():
                        if _why_unlike(bucket, index, bucket.parameters.tensors[index]) is None:
                            bucket.parameters.rebind(index)

    # Objects #

    def _has_other_objects(self) -> bool:
        if sum(map(len, self._dicts)) != self._num_entries:
            return True
        for entries, name, expected in self._edges:
            if entries.get(name) is not expected:
                return True
        return False

    def _expect_values_of_others(self) -> None:
        """torch.func.functional_call has the model compute with other tensors, this once: they are not the model's."""
        for identity, (bucket, index) in self._slots.items():
            for module, name in self._owners.get(identity, ()):
                other = module._parameters.get(name)
                if other is not None and other is not bucket.parameters.tensors[index]:
                    _expect_values(bucket, index, other)

    def _restore_objects(self, is_kept: bool) -> list[str]:
        """Put the sharded parameters back where others stand, with the values of those where `is_kept`.

        The names of those whose values are dropped.
        """
        dropped: list[str] = []
        modules = {id(module) for module in self._model.modules()}
        for identity, (bucket, index) in self._slots.items():
            parameter = bucket.parameters.tensors[index]
            owners = [(module, name) for module, name in self._owners.get(identity, ()) if id(module) in modules]
            others = [(m, n, m._parameters[n]) for m, n in owners if m._parameters.get(n) is not None]
            others = [(module, name, other) for module, name, other in others if other is not parameter]
            if not others:
                if any(name not in module._parameters for module, name in owners):
                    _expect_readable(bucket, index, "was renamed or removed (pruning, parametrization)")
                continue
            is_dropped = not is_kept and not bucket.parameters.stays_unsharded
            if is_dropped:
                dropped.append(_name(bucket, index))
            else:
                self._store_object(bucket, index, [other for *_, other in others], len(others) == len(owners))
            for module, name, _ in others:
                module._parameters[name] = parameter
        for name, parameter in self._model.named_parameters():
            if id(parameter) not in self._slots:
                raise ValueError(
                    f"{name}, of shape {tuple(parameter.shape)}, became a parameter of the model after zerolite.shard "
                    "(a new layer or head, resize_token_embeddings, weight_norm): nothing would reduce, step or save "
                    f"it; {BEFORE}"
                )
        self.watch()
        return dropped

    def _store_object(self, bucket: Bucket, index: int, others: list[nn.Parameter], is_at_every_name: bool) -> None:
        """Store the values of what stands in a sharded parameter's place, at all of its names."""
        name, parameter = _name(bucket, index), bucket.parameters.tensors[index]
        first = others[0]
        for other in others:
            if id(other) in self._slots:
                raise ValueError(f"{name} was tied to {_name(*self._slots[id(other)])} after zerolite.shard: {BEFORE}")
            why = _why_unlike(bucket, index, other)
            if why is not None:
                raise ValueError(f"{name} was replaced after zerolite.shard by a parameter of {why}; {BEFORE}")
            if other.requires_grad and bucket.gradients is None:
                raise ValueError(f"{name}, frozen at zerolite.shard, was replaced by one that requires a gradient")
            if other.grad is not None:
                raise ValueError(
                    f"{name} was replaced by a parameter whose gradient nobody reduced: run the model's own forward "
                    "between the replacement and backward"
                )
            _expect_values(bucket, index, other)
            if other is not first and not torch.equal(other, first):
                raise ValueError(f"{name} is tied, and was replaced by parameters of several values: give it one")
        if not is_at_every_name and not (bucket.parameters.is_readable and torch.equal(first, parameter)):
            raise ValueError(f"{name} is tied, and was replaced at some of its names only: replace all")
        bucket.parameters.store(index, first.detach())
        parameter.requires_grad_(first.requires_grad)


def guard_apply(
    model: nn.Module,
    guard: ParameterGuard,
    dtypes: Callable[[], dict[torch.dtype, str]],
    expect_whole: Callable[[], None],
) -> None:
    """Have `model.to`, `.half()`, `.cpu()` and their like refuse what would untie parameters from their shards.

    dtypes: those of the sharded parameters, with a parameter's name each.
    expect_whole: makes parameters readable, or raises; called where values change.
    """
    own_apply = model._apply

    @functools.wraps(own_apply)
    def apply(fn, *args, **kwargs):
        for dtype, name in dtypes().items():
            given = torch.ones((), dtype=dtype)
            result = fn(given)
            if result is given and given.is_shared() and guard.frees_parameters:
                raise ValueError(
                    f"share_memory: {name} lies in memory that is freed and taken again, which shared memory cannot "
                    "be: share a copy (copy.deepcopy inside zerolite.full_params), or shard at a stage below 3"
                )
            if result.dtype != dtype:
                raise ValueError(
                    f"{name} is sharded as {dtype} and would become {result.dtype}: zerolite keeps its dtype (cast "
                    "before zerolite.shard, or pass precision=zerolite.Precision(param=...) there; for a cast copy, "
                    "export the model or copy.deepcopy it and cast the copy)"
                )
            if not result.is_meta and result.to(torch.float32).item() != 1:
                expect_whole()
        own_apply(fn, *args, **kwargs)
        guard.rebind_unreadable()
        return model

    model._apply = apply


def _refuse_unfrozen(bucket: Bucket) -> None:
    if bucket.gradients is None:
        for slot, parameter in bucket.slots():
            if parameter.requires_grad:
                raise ValueError(
                    f"{slot.name} was frozen when the model was sharded and requires a gradient now, which nobody "
                    "would reduce or step: set requires_grad before zerolite.shard (what is trainable there may "
                    "be frozen and unfrozen later)"
                )


def _store_data(bucket: Bucket) -> None:
    """Store what was given as `p.data`."""
    parameters = bucket.parameters
    given = [(index, local_of(parameters.tensors[index]).detach()) for index in parameters.rebound_slots()]
    for index, values in given:
        if not hasattr(parameters.tensors[index], "_zerolite_info"):  # its hooks are gone, too
            raise ValueError(
                f"{_name(bucket, index)}, a DTensor, was exchanged for another one after zerolite.shard (a part of the "
                f"model was moved or cast, torch.utils.swap_tensors): {BEFORE}"
            )
        why = _why_unlike(bucket, index, values)
        if why is not None:
            raise ValueError(
                f"{_name(bucket, index)} was moved or replaced after zerolite.shard by data of {why}: move it back"
            )
        _expect_values(bucket, index, values)
    if given and not parameters.is_readable:
        bucket.shard.fetch()
        parameters.wait()
    for index, values in given:
        parameters.store(index, values)


def _store_edits(bucket: Bucket) -> None:
    """Store what was written in place."""
    parameters = bucket.parameters
    edited = parameters.edited_slots()
    if not edited:
        parameters.accept_edits()
        return
    if not parameters.is_readable:
        parameters.restore_nan()
        _expect_readable(bucket, edited[0], "was written in place")
    parameters.absorb_edits()


def _is_called_on_others() -> bool:
    """Whether torch.func.functional_call stands on the stack; looked at only where parameters are other objects."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not stateless._functional_call.__code__:
        frame = frame.f_back
    return frame is not None


def _expect_readable(bucket: Bucket, index: int, what: str) -> None:
    if not bucket.parameters.is_readable:
        raise ValueError(f"{_name(bucket, index)} {what} while it was sharded and read as NaN: {WHOLE}")


def _expect_values(bucket: Bucket, index: int, values: torch.Tensor) -> None:
    if not bucket.parameters.is_readable and values.is_floating_point() and values.isnan().any():
        _expect_readable(bucket, index, "was replaced by values computed from it")


def _why_unlike(bucket: Bucket, index: int, other: torch.Tensor) -> str | None:
    """Why `other` cannot hold a slot's values; None where it can."""
    spec, slot = bucket.shard.spec, bucket.layout.slots[index]
    device = bucket.parameters.unsharded.device
    if is_distributed(other):
        return "a DTensor, whose part on this rank zerolite cannot tell from its own"
    if tuple(other.shape) != slot.shape:
        return f"shape {tuple(other.shape)}, not {slot.shape}"
    if other.dtype != spec.dtype:
        return f"dtype {other.dtype}, not {spec.dtype}"
    if other.device != device:
        return f"device {other.device}, not {device}"
    return None


def _name(bucket: Bucket, index: int) -> str:
    return bucket.layout.slots[index].name
