"""Blocks that are alike and need not all be run: how they are skipped, and how their events are filled in.

See activations.py, [Note: repeated blocks run four times].
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from zerolite.engine.trees import tensors_of
from zerolite.memory.moments import Event, Moment, shifted
from zerolite.shards.units import UnitPlan

NUM_RUN = 3  # from the start of a run of blocks that are alike; its last block runs, too


class Run(NamedTuple):
    """Consecutive units [start, stop) of one class whose parameters are alike."""

    start: int
    stop: int

    @property
    def template(self) -> int:
        """The unit whose events the skipped ones get; the unit before it is alike and is run, too."""
        return self.start + NUM_RUN - 1

    @property
    def skipped(self) -> range:
        return range(self.start + NUM_RUN, self.stop - 1)


def alike_runs(plans: Sequence[UnitPlan]) -> list[Run]:
    """The runs of units, the root apart, that are long enough for one to be skipped."""
    runs: list[Run] = []
    start = 1
    for index in range(2, len(plans) + 1):
        if index == len(plans) or _signature(plans[index]) != _signature(plans[start]):
            runs.append(Run(start, index))
            start = index
    return [run for run in runs if len(run.skipped) > 0]


def _signature(plan: UnitPlan) -> tuple:
    parameters = [
        (_own_name(plan, name), tuple(parameter.shape), parameter.dtype, group.is_trainable)
        for group in plan.groups
        for name, parameter in zip(group.names, group.parameters, strict=True)
    ]
    # Blocks of one shape may differ in a switch: a window of attention, whether they are recomputed.
    switches = [
        (name, value)
        for module in plan.module.modules()
        for name, value in vars(module).items()
        if value is None or isinstance(value, bool | str)
    ]
    return type(plan.module), plan.name.rpartition(".")[0], tuple(parameters), tuple(switches)


def _own_name(plan: UnitPlan, name: str) -> str:
    return name.removeprefix(f"{plan.name}.")


class SkippedBlocks:
    """Forwards of blocks, replaced by functions that only make what the template's forward has returned."""

    def __init__(self, runs: Sequence[Run]):
        self.runs = runs
        self._replaced: list[torch.nn.Module] = []

    def install(self, plans: Sequence[UnitPlan]) -> None:
        """Replace the forwards of the runs' skipped units until `restore`; a module with one of its own is left."""
        for run in self.runs:
            modules = [plans[index].module for index in range(run.template, run.stop)]
            if any("forward" in vars(module) for module in modules):
                continue
            outputs = _Outputs()
            outputs.hook = modules[0].register_forward_hook(outputs.remember, with_kwargs=True, prepend=True)
            for index in run.skipped:
                plans[index].module.forward = outputs.make
                self._replaced.append(plans[index].module)

    def restore(self) -> None:
        for module in self._replaced:
            del module.forward
        self._replaced = []


class _Outputs:
    """What a block returns, by what it was given: a tensor of its inputs, or a new one."""

    hook: Any  # on the template, until it has run

    def __init__(self):
        self._leaves: list[Any] | None = None

    def remember(self, module, args, kwargs, output) -> None:
        if self._leaves is not None:
            return
        self.hook.remove()
        given = {(t.untyped_storage()._cdata, tuple(t.shape)): i for i, t in enumerate(tensors_of((args, kwargs)))}
        leaves, self._structure = pytree.tree_flatten(output)
        self._leaves = []
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                index = given.get((leaf.untyped_storage()._cdata, tuple(leaf.shape)))
                leaf = index if index is not None else _Spec(leaf.shape, leaf.dtype, leaf.requires_grad)
            self._leaves.append(leaf)

    def make(self, *args, **kwargs):
        given = tensors_of((args, kwargs))
        assert self._leaves is not None, "the template runs before what is skipped"
        sources = [t for t in given if t.requires_grad and not isinstance(t, torch.nn.Parameter)]
        specs = [leaf for leaf in self._leaves if isinstance(leaf, _Spec)]
        made = iter(_Skip.apply(specs, *sources) if specs else ())
        leaves = []
        for leaf in self._leaves:
            if isinstance(leaf, _Spec):
                leaf = next(made)
            elif isinstance(leaf, int) and not isinstance(leaf, bool):
                leaf = given[leaf]
            leaves.append(leaf)
        return pytree.tree_unflatten(leaves, self._structure)


class _Spec(NamedTuple):
    shape: torch.Size
    dtype: torch.dtype
    requires_grad: bool


class _Skip(torch.autograd.Function):
    """New outputs from inputs, and gradients of the inputs' shapes from those of the outputs."""

    @staticmethod
    def forward(ctx, specs: list[_Spec], *sources: torch.Tensor):
        ctx.sources = [(source.shape, source.dtype) for source in sources]
        made = tuple(torch.empty(spec.shape, dtype=spec.dtype) for spec in specs)
        ctx.mark_non_differentiable(*(t for t, spec in zip(made, specs, strict=True) if not spec.requires_grad))
        return made

    @staticmethod
    def backward(ctx, *gradients):
        return None, *(torch.empty(shape, dtype=dtype) for shape, dtype in ctx.sources)


def expanded(moments: Sequence[Moment], plans: Sequence[UnitPlan], runs: Sequence[Run]) -> tuple[Moment, ...]:
    """The moments, with each skipped unit's replaced by its template's, moved to what lives there."""
    template_of = {unit: run.template for run in runs for unit in run.skipped}
    forward = {moment.unit: part for moment, part in _parts(moments, Event.FORWARD)}
    backward = {moment.unit: part for moment, part in _parts(moments, Event.BACKWARD)}
    found: list[Moment] = []
    shift, end = 0, 0  # bytes that skipped units have not kept; where in `moments` a skipped part ends
    for index, moment in enumerate(moments):
        if index < end:
            continue
        parts = {Event.FORWARD: forward, Event.BACKWARD: backward}.get(moment.event, {})
        if moment.unit not in template_of or moment.unit not in parts or parts[moment.unit].start != index:
            found.append(shifted(moment, shift))
            continue
        unit, part = moment.unit, parts[moment.unit]
        template = template_of[unit]
        copied = parts[template]
        base = moments[copied.start].live_bytes
        for other in moments[copied.start : copied.stop]:
            if other.unit == template:
                name = f"{plans[unit].name}.{_own_name(plans[template], other.parameter)}" if other.parameter else ""
                moved = shifted(other, moment.live_bytes + shift - base)
                found.append(replace(moved, unit=unit, parameter=name))
        grown = moments[copied.stop].live_bytes - base
        shift += grown - (moments[part.stop].live_bytes - moment.live_bytes)
        end = part.stop
    return tuple(found)


def _parts(moments: Sequence[Moment], event: Event) -> Iterator[tuple[Moment, range]]:
    """The moments from each start of a unit, the root apart, to that of the next, or to what follows the last."""
    starts = [index for index, moment in enumerate(moments) if moment.event is event and moment.unit != 0]
    for start, stop in zip(starts, [*starts[1:], len(moments) - 1], strict=True):
        yield moments[start], range(start, stop)
