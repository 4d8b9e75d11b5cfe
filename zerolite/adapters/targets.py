"""Which linear layers get LoRA: by names, by a regular expression, all of them, or the model's fused projection."""

from collections.abc import Collection, Iterable

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from zerolite.adapters import patterns
from zerolite.adapters.config import DEFAULT_TARGETS, Targets
from zerolite.adapters.state import Adapters

ALL_LINEAR = "all-linear"
# A model without q_proj, k_proj and v_proj gets the first of these that it has: GPT-2 and Qwen 1; GPT-NeoX, BLOOM,
# ChatGLM, Falcon; Baichuan; Phi-3; MPT, DBRX, ModernBERT; InternLM 2; vision models; BERT; T5; diffusers.
INSTEAD = (
    ("c_attn",), ("query_key_value",), ("W_pack",), ("qkv_proj",), ("Wqkv",), ("wqkv",), ("qkv",),
    ("query", "key", "value"), ("q", "k", "v"),
    ("to_q", "to_k", "to_v"),
)  # fmt: skip

# What multi-modal models of transformers call their encoders of images and sound.
TOWERS = (
    "vision_tower", "visual", "vision_model", "vision_encoder", "image_tower", "image_encoder", "video_tower",
    "audio_tower", "audio_encoder", "speech_encoder",
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
            return _default(model, modules, apart)
        elif unmatched := [target for target in targets if not any(matches(name, (target,)) for name in modules)]:
            check(model, {}, f"targets {', '.join(unmatched)}", apart)
    found = {name: module for name, module in modules.items() if matches(name, targets)}
    check(model, found, f"targets={targets!r}", apart)
    return targets, found


def _default(
    model: nn.Module, modules: dict[str, nn.Module], apart: Collection[str]
) -> tuple[Targets, dict[str, nn.Module]]:
    """The projections of attention: of its language model alone where a model reads images or sound, too."""
    language = _language_modules(model, modules)
    choices = (DEFAULT_TARGETS, *INSTEAD)
    names = next((names for names in choices if any(matches(module, names) for module in language)), DEFAULT_TARGETS)
    found = {name: module for name, module in language.items() if matches(name, names)}
    if len(language) == len(modules):
        check(model, found, f"targets={names!r}", apart)
        return names, found
    check(model, found, f"targets={names!r}, the default, which is of the language model,", apart)
    inner = {name: _innermost_model(model, name) for name in found}
    models = {name for name in inner.values() if not any(other.startswith(f"{name}.") for other in inner.values())}
    if len(models) > 1 and not model.config.is_encoder_decoder:
        raise ValueError(
            f"the default targets {', '.join(names)} are in several models of {type(model).__name__}: "
            f"{', '.join(sorted(models))}; give targets=, such as the regular expression "
            f"'{min(models)}.*({'|'.join(names)})'"
        )
    return shortest(modules, found), found


def _language_modules(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """What is in a model's decoder and in no model of other inputs; everything where the model reads text alone."""
    if not isinstance(model, PreTrainedModel):
        return modules
    if "text" not in _inputs_of(model) or (
        len(_inputs_of(model)) == 1 and model.config.get_text_config() is model.config
    ):
        return modules
    is_sequence_to_sequence = model.config.is_encoder_decoder
    encoder = model.get_encoder() if is_sequence_to_sequence else None  # is half of the model, whatever it reads
    others = [name for name, module in modules.items() if module is not encoder and _is_tower(name, module)]
    language = {name: module for name, module in modules.items() if not is_inside(name, others)}
    decoder = model.get_decoder()
    if decoder is model or is_sequence_to_sequence:
        return language
    inside = set(decoder.modules())
    return {name: module for name, module in language.items() if module in inside}


def _is_tower(name: str, module: nn.Module) -> bool:
    """Whether a module of a multi-modal model is its encoder of images or sound."""
    if name.rpartition(".")[2] in TOWERS:
        return True
    return isinstance(module, PreTrainedModel) and "text" not in _inputs_of(module)


def _inputs_of(model: PreTrainedModel) -> tuple[str, ...]:
    """Of "text", "image", "audio", ...: what the model reads."""
    inputs = getattr(model, "input_modalities", "text")  # of classes since transformers 5
    return (inputs,) if isinstance(inputs, str) else tuple(inputs)


def _innermost_model(model: nn.Module, name: str) -> str:
    """The name of the innermost model of transformers that the module of this name is in."""
    parents = [name[:end] for end in range(len(name)) if name[end] == "."]
    return next((p for p in reversed(parents) if isinstance(model.get_submodule(p), PreTrainedModel)), "")


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
