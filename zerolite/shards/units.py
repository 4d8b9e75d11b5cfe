"""Which parameters live together: modules -> units -> buckets, in the order of registration."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from torch import nn

from zerolite.shards.dtensors import Ranks, block_of, largest_numel, local_shape, splits_of
from zerolite.shards.layout import BucketLayout, Packed, pack

# Buckets of this many elements: 64 MiB in bf16. A transformer block of LLaMA-7B has six, a small one is one.
BUCKET_NUMEL = 32 * 1024 * 1024
# Frozen ones have no gradients that could leave early: all of a block's are gathered at once.
FROZEN_BUCKET_NUMEL = 1 << 40

UnitRule = type[nn.Module] | Iterable[type[nn.Module]] | Callable[[nn.Module], bool]


@dataclass
class ParameterGroup:
    """Parameters of one unit that share what is below, in the order of registration."""

    names: list[str]
    parameters: list[nn.Parameter]
    position: int  # of its first parameter, in the model's order
    is_trainable: bool
    stays_unsharded: bool  # at stage 3 too: adapters are too small to be worth a gather
    is_on_meta: bool  # without values when it was planned
    splits: tuple[Ranks, ...] = ()  # over which other ranks have other parts of all of them: dtensors.py


@dataclass
class UnitPlan:
    """One module's own parameters, less those of units inside it; a group is trainable or frozen."""

    name: str
    module: nn.Module
    groups: list[ParameterGroup]

    @property
    def is_trainable(self) -> bool:
        return any(group.is_trainable for group in self.groups)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost modules that a ModuleList or Sequential repeats: at least two of one class, with parameters."""
    blocks: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        repeated: set[type] = set()
        if isinstance(module, nn.ModuleList | nn.Sequential):
            classes = [type(child) for child in module if any(True for _ in child.parameters())]
            repeated = {cls for cls in classes if classes.count(cls) > 1}
        for child in module.children():
            if type(child) in repeated and any(True for _ in child.parameters()):
                if not any(child is block for block in blocks):
                    blocks.append(child)
            else:
                visit(child)

    visit(model)
    return blocks


def unit_modules(model: nn.Module, rule: UnitRule | None) -> list[nn.Module]:
    """The modules that become units of their own; everything else belongs to the root's unit."""
    if rule is None:
        return repeated_blocks(model)
    classes = [rule] if isinstance(rule, type) else list(rule) if isinstance(rule, Iterable) else None
    if classes is None and not callable(rule):
        raise TypeError(f"units= takes module classes or a predicate over modules, got {rule!r}")
    if classes is not None and not all(isinstance(cls, type) for cls in classes):
        raise TypeError(f"units= takes module classes or a predicate over modules, got {rule!r}")

    def is_unit(module: nn.Module) -> bool:
        return isinstance(module, tuple(classes)) if classes is not None else bool(rule(module))  # type: ignore[operator]

    chosen = [module for module in model.modules() if module is not model and is_unit(module)]
    if not chosen:
        raise ValueError(f"units={rule!r} matches no module of {type(model).__name__}: name a class that it contains")
    return chosen


def plan_units(
    model: nn.Module,
    rule: UnitRule | None,
    dtype_of: Callable[[nn.Parameter], object],
    stays_unsharded: Collection[nn.Parameter] = (),
) -> list[UnitPlan]:
    """Assign every parameter to the innermost unit that holds all its owners; one that several units share to the root.

    dtype_of: the dtype that a parameter will have; a bucket has one.
    stays_unsharded: parameters that every rank keeps whole at stage 3 too.
    """
    chosen = {id(module): module for module in [model, *unit_modules(model, rule)]}
    names = {id(module): name for name, module in model.named_modules()}
    home: dict[int, int] = {}  # parameter -> unit module

    def visit(module: nn.Module, unit: int) -> None:
        unit = id(module) if id(module) in chosen else unit
        for parameter in module.parameters(recurse=False):
            previous = home.setdefault(id(parameter), unit)
            if previous != unit:
                home[id(parameter)] = id(model)  # tied across units
        for child in module.children():
            visit(child, unit)

    visit(model, id(model))

    unsharded = {id(parameter) for parameter in stays_unsharded}
    plans: dict[int, UnitPlan] = {}
    open_groups: dict[tuple, ParameterGroup] = {}
    last_unit = None
    for position, (name, parameter) in enumerate(model.named_parameters()):
        unit = home[id(parameter)]
        if unit != last_unit:
            # A bucket never spans parameters of another unit: the output layer's gradients, first in backward, must
            # not wait for the input embedding's, last in backward, though one unit holds both.
            open_groups.clear()
            last_unit = unit
        plan = plans.setdefault(unit, UnitPlan(names[unit] or "(root)", chosen[unit], []))
        kind = (parameter.requires_grad, id(parameter) in unsharded, parameter.is_meta, splits_of(parameter))
        key = (dtype_of(parameter), *kind)
        if key not in open_groups:
            open_groups[key] = ParameterGroup([], [], position, *kind)
            plan.groups.append(open_groups[key])
        open_groups[key].names.append(name)
        open_groups[key].parameters.append(parameter)
    return sorted(plans.values(), key=lambda plan: (plan.module is not model, plan.groups[0].position))


def layouts_of(group: ParameterGroup, world_size: int) -> list[BucketLayout]:
    """The buckets of one group, cut for `world_size` ranks."""
    parameters = zip(group.names, group.parameters, strict=True)
    bucket_numel = BUCKET_NUMEL if group.is_trainable else FROZEN_BUCKET_NUMEL
    return pack([_packed(name, parameter) for name, parameter in parameters], world_size, bucket_numel)


def _packed(name: str, parameter: nn.Parameter) -> Packed:
    block = block_of(parameter)
    whole_shape = tuple(parameter.shape) if block is not None else None
    return Packed(name, local_shape(parameter), block, whole_shape, largest_numel(parameter))
