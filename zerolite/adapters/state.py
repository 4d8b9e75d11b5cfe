"""Which adapters a model has, which of them its forwards use, and what they ask of the engine."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from zerolite.adapters.config import LoraConfig, PromptConfig
from zerolite.adapters.walk import unsharded_parameters
from zerolite.engine import extensions
from zerolite.engine.engine import find_engine


def has_its_values(model: nn.Module) -> None:
    """Of an adapter whose values do not come from the base."""


@dataclass
class Adapter:
    """One adapter: its configuration and its parameters, by their names in the model."""

    name: str
    config: LoraConfig | PromptConfig
    # Gives parameters of this kind the values that a base on the meta device could not give. Collective.
    compute_initial_values: Callable[[nn.Module], None] = has_its_values
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    # Modules that train whole, by the names of those of the base: these are sharded as the base's.
    copies: dict[str, nn.Module] = field(default_factory=dict)
    lacks_copied_values: bool = False  # the base had none when it was copied
    is_merged: bool = False  # it is part of the base's weights, so forwards leave it out


@dataclass
class Adapters:
    """All adapters of one model; its adapted modules hold this object and ask it which one is on."""

    by_name: dict[str, Adapter] = field(default_factory=dict)
    active: str | None = None
    num_disabled: int = 0  # nested `disabled` blocks
    is_training_checked: bool = False  # the hook of `use` is on the model

    @property
    def current(self) -> Adapter | None:
        """The adapter that forwards use now; None: the base model alone."""
        if self.active is None or self.num_disabled > 0:
            return None
        adapter = self.by_name[self.active]
        return None if adapter.is_merged else adapter


def adapters_of(model: nn.Module) -> Adapters:
    """The adapters of a model; ValueError where there is none."""
    adapters = getattr(model, "_zerolite_adapters", None)
    if adapters is None:
        raise ValueError(
            f"this {type(model).__name__} has no adapter: call zerolite.adapters.add_lora, add_prompt or load first"
        )
    return adapters


def adapter_of(model: nn.Module, name: str | None) -> Adapter:
    """The adapter of that name, or the active one; ValueError where there is none."""
    adapters = adapters_of(model)
    name = adapters.active if name is None else name
    if name not in adapters.by_name:
        raise ValueError(f"there is no adapter {name!r}: the model has {', '.join(adapters.by_name)}")
    return adapters.by_name[name]


def begin(
    model: nn.Module,
    name: str,
    config: LoraConfig | PromptConfig,
    compute_initial_values: Callable[[nn.Module], None] = has_its_values,
) -> Adapter:
    """Register a new adapter, without parameters yet, as the active one; everything that was there is frozen.

    Raises ValueError for a model that is sharded already, and for a name that is taken or no identifier.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"adapters are added to a torch.nn.Module, got {type(model).__name__}")
    if find_engine(model) is not None:
        raise ValueError(
            "adapters are added before zerolite.shard, which lays all parameters out; this model is sharded"
        )
    if not name.isidentifier():
        raise ValueError(f"an adapter's name is an identifier such as 'default', got {name!r}")
    adapters = getattr(model, "_zerolite_adapters", None)
    if adapters is None:
        adapters = model._zerolite_adapters = Adapters()
        extensions.register(model, AdapterExtension())
    if name in adapters.by_name:
        raise ValueError(f"the model has an adapter {name!r} already: choose another name")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    adapter = adapters.by_name[name] = Adapter(name, config, compute_initial_values)
    adapters.active = name
    return adapter


def adopt(model: nn.Module, adapter: Adapter) -> None:
    """Give an adapter all parameters that have been added to the model since `begin`: those that are in no other.

    They train, and at stage 3 all but its copies of modules stay unsharded: too small to be worth a gather.
    """
    taken = {id(p) for other in adapters_of(model).by_name.values() for p in other.parameters.values()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in taken:
            adapter.parameters[name] = parameter


def use(model: nn.Module, name: str) -> None:
    """Have forwards use the adapter of that name, and no other train, as PEFT's set_adapter. Every rank calls it alike.

    On a sharded model an adapter that was frozen when it was sharded computes, and does not train: a forward in
    training mode and with gradients is a ValueError then.
    Raises ValueError where the model has no adapter of that name.
    """
    adapters, adapter = adapters_of(model), adapter_of(model, name)
    adapters.active = adapter.name
    if find_engine(model) is None:
        for other in adapters.by_name.values():
            for parameter in other.parameters.values():
                parameter.requires_grad_(other is adapter and not adapter.is_merged)
    elif not adapters.is_training_checked:
        adapters.is_training_checked = True
        model.register_forward_pre_hook(_refuse_to_train_frozen, prepend=True)


def _refuse_to_train_frozen(model: nn.Module, args: tuple) -> None:
    """Pre-hook of a sharded model whose adapters are switched."""
    current = adapters_of(model).current
    if current is None or not model.training or not torch.is_grad_enabled():
        return
    if current.parameters and not any(parameter.requires_grad for parameter in current.parameters.values()):
        raise ValueError(
            f"adapter {current.name!r} was frozen when the model was sharded, so this forward would train nothing: "
            f"call zerolite.adapters.use(model, {current.name!r}) before zerolite.shard to train it, and model.eval() "
            "or torch.no_grad() to evaluate it"
        )


@contextlib.contextmanager
def disabled(model: nn.Module):
    """Inside, forwards are those of the base model. Every rank must enter it alike.

    Raises ValueError where the model has no adapter.
    """
    adapters = adapters_of(model)
    adapters.num_disabled += 1
    try:
        yield model
    finally:
        adapters.num_disabled -= 1


@contextlib.contextmanager
def evaluating(model: nn.Module):
    """Inside, every module is in eval mode; afterwards each is as it was."""
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in in_training:
            module.training = True


@dataclass(frozen=True)
class AdapterExtension:
    """The hooks of engine.extensions.Extension; registered with a model's first adapter."""

    def stays_unsharded(self, model: nn.Module) -> list[nn.Parameter]:
        adapters = adapters_of(model).by_name.values()
        copied = {id(p) for adapter in adapters for module in adapter.copies.values() for p in module.parameters()}
        return [p for p in self.adds(model) if id(p) not in copied]

    def adds(self, model: nn.Module) -> list[nn.Parameter]:
        return [p for adapter in adapters_of(model).by_name.values() for p in adapter.parameters.values()]

    @torch.no_grad()
    def after_sharding(self, model: nn.Module) -> None:
        """Compute initial values that come from the base, where it had none when adapters were added. Collective."""
        for compute in dict.fromkeys(a.compute_initial_values for a in adapters_of(model).by_name.values()):
            compute(model)
        for _ in unsharded_parameters(model, self.stays_unsharded(model), writeback=True):
            pass  # what was written reaches the shards

    def before_export(self, model: nn.Module) -> None:
        """ValueError while an adapter is on and not merged."""
        current = adapters_of(model).current
        if current is not None:
            raise ValueError(
                f"adapter {current.name!r} is on, and an export holds the base alone: call adapters.merge first, "
                "or adapters.save for the adapter, or export inside `with zerolite.adapters.disabled(model)`"
            )
