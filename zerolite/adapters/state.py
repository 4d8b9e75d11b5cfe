"""Which adapters a model has, and which of them its forwards use."""

import contextlib
from dataclasses import dataclass, field

from torch import nn

from zerolite.adapters.config import LoraConfig, PromptConfig


@dataclass
class Adapter:
    """One adapter: its configuration and its parameters, by their names in the model."""

    name: str
    config: LoraConfig | PromptConfig
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    is_merged: bool = False  # it is part of the base's weights, so forwards leave it out


@dataclass
class Adapters:
    """All adapters of one model; its adapted modules hold this object and ask it which one is on."""

    by_name: dict[str, Adapter] = field(default_factory=dict)
    active: str | None = None
    num_disabled: int = 0  # nested `disabled` blocks

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


def begin(model: nn.Module, name: str, config: LoraConfig | PromptConfig) -> Adapter:
    """Register a new adapter, without parameters yet, as the active one; everything that was there is frozen.

    Raises ValueError for a model that is sharded already, and for a name that is taken or no identifier.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"adapters are added to a torch.nn.Module, got {type(model).__name__}")
    if hasattr(model, "_zerolite"):
        raise ValueError(
            "adapters are added before zerolite.shard, which lays all parameters out; this model is sharded"
        )
    if not name.isidentifier():
        raise ValueError(f"an adapter's name is an identifier such as 'default', got {name!r}")
    adapters = getattr(model, "_zerolite_adapters", None)
    if adapters is None:
        adapters = model._zerolite_adapters = Adapters()
    if name in adapters.by_name:
        raise ValueError(f"the model has an adapter {name!r} already: choose another name")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    adapter = adapters.by_name[name] = Adapter(name, config)
    adapters.active = name
    return adapter


def adopt(model: nn.Module, adapter: Adapter) -> None:
    """Give an adapter all parameters that have been added to the model since `begin`: those that are in no other.

    They train, and at stage 3 they stay whole on every rank: too small to be worth a gather.
    """
    taken = {id(p) for other in adapters_of(model).by_name.values() for p in other.parameters.values()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in taken:
            adapter.parameters[name] = parameter


def use(model: nn.Module, name: str) -> None:
    """Have forwards use the adapter of that name. Every rank must call it alike."""
    adapters_of(model).active = adapter_of(model, name).name


@contextlib.contextmanager
def disabled(model: nn.Module):
    """Inside, forwards are those of the base model. Every rank must enter it alike."""
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
