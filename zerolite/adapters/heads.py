"""Modules that an adapter trains whole: the head of a task, and what the user names. PEFT's `modules_to_save`.

[Note: a copy for each adapter]
The base stays what it is: without an adapter, or with another one, forwards use the base's own module. So the adapter
has a copy, in `model.trained_copies.<adapter>`, and the module of the base changes its class for one whose forward asks
which adapter is on. Names of the base's parameters stay; see [Note: a layer changes its class] of layers.py. Code that
reads `head.weight` gets the weight that forwards use, as with PEFT.
"""

import copy
import functools
import re
import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from zerolite.adapters import targets as naming
from zerolite.adapters.layers import LoraLayer
from zerolite.adapters.state import Adapter, Adapters, adapters_of
from zerolite.adapters.walk import unsharded_parameters

# Classes of transformers whose head no pretraining has: for a task with labels of its own.
TASK = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice|CTC)")


class Copied(nn.Module):
    """Mixed into the class of a module of the base that adapters have copies of."""

    adapters: Adapters  # the model's; it says which adapter forwards use
    copied_as: str  # its name in the model

    def forward(self, *args, **kwargs):
        adapter = self.adapters.current
        if adapter is not None and adapter.lacks_copied_values and self.copied_as in adapter.copies:
            raise ValueError(
                f"adapter {adapter.name!r} starts from the values of {self.copied_as}, which had none when it was "
                "added: zerolite.load_pretrained(adapt=...) and zerolite.shard(model) copy them; where neither is "
                "called, add the adapter once the weights are loaded"
            )
        twin = self._twin()
        return super().forward(*args, **kwargs) if twin is None else twin(*args, **kwargs)

    def __getattr__(self, name: str):
        twin = self._twin() if "copied_as" in self.__dict__ else None
        if twin is not None and (name in twin._parameters or name in twin._modules):
            return getattr(twin, name)
        return super().__getattr__(name)

    def _twin(self) -> nn.Module | None:
        """The copy that forwards use now; None: the base's module itself, as long as a copy waits for its values."""
        adapter = self.adapters.current
        return None if adapter is None or adapter.lacks_copied_values else adapter.copies.get(self.copied_as)


@functools.cache
def copied_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a module's class that a copied module is of; one for each class."""
    return type(f"Copied{cls.__name__}", (Copied, cls), {"__module__": __name__, "copy_class": cls})


# Which modules #


def find(model: nn.Module, names: Iterable[str] | None) -> tuple[tuple[str, ...], dict[str, nn.Module]]:
    """Resolve a user's `modules_to_save`: (ends of names as PEFT's files have them, modules by their names).

    names: ends of names; None: the modules of a model's new head. Raises ValueError for a name without a module.
    """
    if names is None:
        heads = tuple(task_head(model))
        if not heads:
            _warn_of_what_may_be_new(model)
        found = matched(model, heads)
        if more := sorted(found.keys() - set(heads)):
            raise ValueError(
                f"the head of {type(model).__name__} is {', '.join(heads)}; in PEFT's modules_to_save these names also "
                f"mean {', '.join(more[:4])}: give modules_to_save=, or () to leave the head frozen"
            )
        return heads, found
    if isinstance(names, str):
        raise ValueError(f"modules_to_save= is a list of names of modules, got {names!r}")
    names = tuple(names)
    for name in names:
        if not isinstance(name, str) or not matched(model, (name,)):
            top = ", ".join(child for child in naming.modules_of(model) if "." not in child)
            raise ValueError(f"modules_to_save= has {name!r}, where no name of a module ends; the outermost are {top}")
    return names, matched(model, names)


def matched(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The modules that PEFT would save for these names: those whose names end so, in the middle of a word too."""
    ends = tuple(names)
    return {name: module for name, module in naming.modules_of(model).items() if ends and name.endswith(ends)}


def task_head(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost modules of a new head, by name: what a classifier of transformers has outside of its base model."""
    return _outside(model) if any(TASK.search(cls.__name__) for cls in type(model).__mro__) else {}


def _outside(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost modules with parameters that a model of transformers has outside of its base model."""
    if not isinstance(model, PreTrainedModel):
        return {}
    base = model.base_model
    children = {name: child for name, child in naming.modules_of(model).items() if "." not in name}
    children = {name: child for name, child in children.items() if any(True for _ in child.parameters())}
    if base is model:  # nothing says where the base ends, so the names that PEFT knows do
        return {name: child for name, child in children.items() if name in ("classifier", "score", "qa_outputs")}
    return {name: child for name, child in children.items() if base not in child.modules()}


def _warn_of_what_may_be_new(model: nn.Module) -> None:
    """A warning names what stays frozen outside of the base model and is not the output layer."""
    outside = _outside(model)
    if outside and model.get_output_embeddings() is None:
        warnings.warn(
            f"{', '.join(outside)} of {type(model).__name__} is no part of its base model and stays frozen: if it is "
            f"new, give modules_to_save={list(outside)}, which trains it and saves it with the adapter; if not, ()",
            stacklevel=4,
        )


def check(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """ValueError, with the name, for a module that would compute without its copy, or with a wrong one."""
    embeddings = {id(model.get_input_embeddings()), id(model.get_output_embeddings())} if _is_decoder(model) else set()
    inside = {id(p) for module in modules.values() for p in module.parameters()}
    outside = {
        id(p)
        for name, module in model.named_modules(remove_duplicate=False)
        if not naming.is_inside(name, modules)
        for p in module.parameters(recurse=False)
    }
    for name, module in modules.items():
        parameters = list(module.parameters())
        reason = ""
        if any(id(child) in embeddings for child in module.modules()) or not parameters:
            reason = "embeddings and output layers, whose weights other code reads, and modules without parameters"
        elif any(naming.is_inside(name, [other]) for other in modules if other != name):
            reason = "a module that lies in another one of them"
        elif "forward" in vars(module):
            reason = "a module with a forward of its own on the instance, which would pass the copy over"
        elif any(True for _ in module.buffers()):
            reason = "modules with buffers, which adapter files have no place for"
        elif any(isinstance(child, LoraLayer) for child in module.modules()):
            reason = "a module in which another adapter has LoRA"
        elif not all(p.is_floating_point() for p in parameters):
            reason = "quantised modules"
        elif any(id(p) in inside & outside for p in parameters):
            reason = "modules whose weights are tied to another module's"
        if reason:
            raise ValueError(f"modules_to_save={[name]} is not supported: no adapter trains {reason}")


def _is_decoder(model: nn.Module) -> bool:
    return isinstance(model, PreTrainedModel) and model.can_generate()


# Copies #


def attach(model: nn.Module, adapter: Adapter, modules: Mapping[str, nn.Module]) -> None:
    """Give a new adapter its copies of checked modules; they require gradients. On the meta device: NaN on the CPU."""
    if not modules:
        return
    adapters = adapters_of(model)
    if not hasattr(model, "trained_copies"):
        model.trained_copies = nn.ModuleDict()
    model.trained_copies[adapter.name] = nn.ModuleDict()
    for name, module in modules.items():
        twin = copy.deepcopy(module, {id(adapters): adapters})
        for hooks in (twin._forward_hooks, twin._forward_pre_hooks, twin._backward_hooks, twin._backward_pre_hooks):
            hooks.clear()  # the base's module calls its own, around the copy
        if isinstance(module, Copied):
            twin.__class__ = type(module).copy_class
            del twin.adapters, twin.copied_as
        else:
            module.__class__ = copied_class(module.__class__)
            module.adapters, module.copied_as = adapters, name
        if any(p.is_meta for p in twin.parameters()):
            twin.to_empty(device="cpu")
            for parameter in twin.parameters():
                nn.init.constant_(parameter, float("nan"))
            adapter.lacks_copied_values = True
        model.trained_copies[adapter.name][name.replace(".", "-")] = adapter.copies[name] = twin.requires_grad_(True)


def parameter_names(adapter: Adapter, modules: Mapping[str, nn.Module] | None = None) -> dict[str, str]:
    """Name of each parameter of the adapter's copies -> name of the base's parameter that it is a copy of."""
    modules = adapter.copies if modules is None else modules
    return {
        f"trained_copies.{adapter.name}.{name.replace('.', '-')}.{key}": f"{name}.{key}"
        for name, module in modules.items()
        for key, _ in module.named_parameters()
    }


def values_of(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """The values of an adapter's copies by the names of the base's parameters. Collective if there are any."""
    names = parameter_names(adapter)
    return dict(zip(names.values(), _gathered(model, [adapter.parameters[name] for name in names]), strict=True))


def merge(model: nn.Module, adapter: Adapter) -> None:
    """Write an adapter's copies into the base's modules. Collective if there are any."""
    base = dict(model.named_parameters(remove_duplicate=False))
    _write(model, {base[name]: value for name, value in values_of(model, adapter).items()})


def copy_missing_values(model: nn.Module) -> None:
    """Fill copies of modules that had no values when they were copied. Collective if there are any."""
    base = dict(model.named_parameters(remove_duplicate=False))
    for adapter in adapters_of(model).by_name.values():
        if adapter.lacks_copied_values:
            names = parameter_names(adapter)
            values = _gathered(model, [base[name] for name in names.values()])
            _write(model, {adapter.parameters[name]: value for name, value in zip(names, values, strict=True)})
            adapter.lacks_copied_values = False


def _gathered(model: nn.Module, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Whole values, copies where the model is sharded."""
    values: dict[int, Tensor] = {}
    for some in unsharded_parameters(model, parameters, writeback=False) if parameters else ():
        values |= {id(parameter): parameter.detach().clone() for parameter in some}
    return [values[id(parameter)] for parameter in parameters]


@torch.no_grad()
def _write(model: nn.Module, values: dict[nn.Parameter, Tensor]) -> None:
    for parameters in unsharded_parameters(model, values, writeback=True) if values else ():
        for parameter in parameters:
            parameter.copy_(values[parameter])
