"""Which linear layers get LoRA: by names, by a regular expression, all of them, or the model's fused projection."""

from collections.abc import Collection, Iterable

from torch import nn
from transformers.pytorch_utils import Conv1D

from zerolite.adapters import patterns
from zerolite.adapters.config import DEFAULT_TARGETS, Targets
from zerolite.adapters.state import Adapters

ALL_LINEAR = "all-linear"
# A model without q_proj, k_proj and v_proj gets the first of these that it has: GPT-2 and Qwen 1; GPT-NeoX, BLOOM,
# ChatGLM, Falcon; Baichuan; Phi-3; MPT, DBRX, ModernBERT; InternLM 2; vision models; BERT; T5.
INSTEAD = (
    ("c_attn",), ("query_key_value",), ("W_pack",), ("qkv_proj",), ("Wqkv",), ("wqkv",), ("qkv",),
    ("query", "key", "value"), ("q", "k", "v"),
)  # fmt: skip


def find(
    model: nn.Module, targets: str | Iterable[str], apart: Collection[str] = ()
) -> tuple[Targets, dict[str, nn.Module]]:
    """Resolve a user's `targets`: (targets as a PEFT file has them, layers by their names).

    targets: as in `add_lora`. apart: names of modules that train whole, so that nothing in them is a target.
    Raises ValueError where a name matches no module, or one that is no linear layer.
    """
    modules = {name: module for name, module in modules_of(model).items() if not is_inside(name, apart)}
    if isinstance(targets, str):
        if targets.lower() == ALL_LINEAR:
            found = _all_linear(model, modules)
            return shortest(modules, found), found
    else:
        targets = tuple(targets)
        if not targets or not all(isinstance(target, str) and target for target in targets):
            raise ValueError(f"targets= takes names of layers, a regular expression or {ALL_LINEAR!r}, got {targets!r}")
        if set(targets) == set(DEFAULT_TARGETS):
            targets = next(
                (names for names in (DEFAULT_TARGETS, *INSTEAD) if any(matches(m, names) for m in modules)), targets
            )
        elif unmatched := [target for target in targets if not any(matches(name, (target,)) for name in modules)]:
            check(model, {}, f"targets {', '.join(unmatched)}", apart)
    found = {name: module for name, module in modules.items() if matches(name, targets)}
    check(model, found, f"targets={targets!r}", apart)
    return targets, found


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of the base model by its name, without the adapters' own modules."""
    adapters = getattr(model, "_zerolite_adapters", None) or Adapters()
    theirs = {id(p) for adapter in adapters.by_name.values() for p in adapter.parameters.values()}

    def is_of_base(module: nn.Module) -> bool:
        parameters = list(module.parameters())
        return not parameters or any(id(parameter) not in theirs for parameter in parameters)

    return {name: module for name, module in model.named_modules() if name and (not theirs or is_of_base(module))}


def matches(name: str, targets: Targets) -> bool:
    """Whether PEFT would target the module of this name."""
    if isinstance(targets, str):
        return patterns.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def is_inside(name: str, modules: Iterable[str]) -> bool:
    """Whether the module of this name is one of `modules`, or lies in one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def is_linear(module: nn.Module) -> bool:
    """Whether LoRA can go on the module: nn.Linear, or transformers' Conv1D, which is one with a transposed weight."""
    return isinstance(module, nn.Linear | Conv1D)


def shortest(modules: dict[str, nn.Module], found: Iterable[str]) -> tuple[str, ...]:
    """Targets that match the found modules and no other: the ends of their names if that is so, else whole names."""
    found = set(found)
    ends = tuple(sorted({name.rpartition(".")[2] for name in found}))
    return ends if {name for name in modules if matches(name, ends)} == found else tuple(sorted(found))


def _all_linear(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = {name: module for name, module in modules.items() if is_linear(module) and module is not head}
    if not found:
        raise ValueError(f"{type(model).__name__} has no linear layers but its output head: nothing to adapt")
    return found


def check(model: nn.Module, found: dict[str, nn.Module], what: str, apart: Collection[str] = ()) -> None:
    """ValueError where `found` is empty or has a module that is no linear layer; `what` is the user's request."""
    if not found:
        whole = f" ({', '.join(apart)} trains whole: see modules_to_save)" if apart else ""
        raise ValueError(f"{what} match no module{whole}: {_what_there_is(model)}")
    for name, module in found.items():
        if not is_linear(module):
            raise ValueError(
                f"{what} match {name}, which is of class {type(module).__name__}; LoRA goes on torch.nn.Linear and "
                f"transformers' Conv1D: {_what_there_is(model)}"
            )


def _what_there_is(model: nn.Module) -> str:
    ends = dict.fromkeys(name.rpartition(".")[2] for name, module in modules_of(model).items() if is_linear(module))
    return f"the linear layers of {type(model).__name__} are {', '.join(ends) or 'none'}"
