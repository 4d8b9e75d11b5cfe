"""LoRA adapters in PEFT's format: names of tensors, and keys of adapter_config.json."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from zerolite.adapters import heads, patterns
from zerolite.adapters import targets as naming
from zerolite.adapters.config import LoraConfig
from zerolite.adapters.layers import matrix
from zerolite.adapters.lora import attach, layers_of
from zerolite.adapters.state import Adapter

PREFIX = "base_model.model."
SUFFIXES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}

# PEFT's defaults for keys that a file leaves out. They are not zerolite's.
READ: dict[str, Any] = {
    "r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": None, "exclude_modules": [],
    "layers_to_transform": [], "layers_pattern": [], "rank_pattern": {}, "alpha_pattern": {},
    "use_rslora": False, "use_dora": False, "init_lora_weights": True, "modules_to_save": [],
}  # fmt: skip
# Keys that change no forward of a loaded adapter. A layer's class says whether its weight is transposed.
WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "eva_config", "fan_in_fan_out", "inference_mode", "peft_type",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
# Any other key, known to PEFT or not, must have its value here or an empty one, which switches it off.
OFF = {"bias": "none", "megatron_core": "megatron.core"}
# Initialisations that leave the base unchanged. The others (PiSSA, OLoRA, CorDA, LoftQ, ...) belong to a changed base.
KEEPS_BASE = (True, False, "gaussian", "orthogonal", "eva")


def to_peft(model: nn.Module, adapter: Adapter) -> tuple[dict, dict[str, Tensor]]:
    """(adapter_config.json, tensors by PEFT's names) of a LoRA adapter; the tensors share memory with the model.

    The adapter's parameters must be unsharded, but for copies of modules: collective where it has some.
    """
    config, layers = _config_of(adapter), layers_of(model, adapter.name)
    entries = {
        "peft_type": "LORA",
        "task_type": _task_of(model, adapter),
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "revision": None,
        "auto_mapping": None,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": config.targets if isinstance(config.targets, str) else list(config.targets),
        "fan_in_fan_out": any(isinstance(layer, Conv1D) for layer in layers.values()),
        "bias": "none",
        "init_lora_weights": True,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": list(config.modules_to_save) or None,
    }
    values = {f"{name}.lora.{adapter.name}.{kind}": key for name in layers for kind, key in _keys(name, config)}
    tensors = {key: adapter.parameters[name].detach() for name, key in values.items()}
    return entries, tensors | {PREFIX + name: value for name, value in heads.values_of(model, adapter).items()}


def from_peft(model: nn.Module, name: str, config: dict, tensors: dict[str, Tensor]) -> None:
    """Add a LoRA adapter with PEFT's configuration and values to a model that is not sharded, as its active adapter.

    Values are cast to the dtypes of the layers. Raises ValueError, and adds nothing, for a key of the configuration
    that is not supported and for tensors that do not fit this model; the text names them.
    """
    lora, layers = check(model, config, tensors)
    adapter = attach(model, name, lora, layers, heads.matched(model, lora.modules_to_save))
    for parameter_name, value in _values(layers, adapter, tensors).items():
        adapter.parameters[parameter_name].data.copy_(value)
    adapter.lacks_copied_values = False
    for layer in layers.values():
        layer.lora[name].is_magnitude_missing = False


def check(model: nn.Module, config: dict, tensors: dict[str, Tensor]) -> tuple[LoraConfig, dict[str, nn.Module]]:
    """What `from_peft` adds, and to which layers; it raises what that raises. `tensors` may lie on the meta device."""
    lora, layers = _meaning(model, config)
    modules = heads.matched(model, lora.modules_to_save)
    heads.check(model, modules)
    _check_tensors(_expected(layers, lora) | _shapes_of(modules), tensors)
    return lora, layers


def values_of(model: nn.Module, adapter: Adapter, config: dict, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The file's values for an adapter that the model has, by the names of its parameters.

    Raises ValueError where the file's adapter has other layers, shapes, scales or another kind.
    """
    lora, layers = _meaning(model, config)
    own, there = _config_of(adapter), layers_of(model, adapter.name)
    _check_tensors(_expected(there, own) | _shapes_of(adapter.copies), tensors)
    for what, ours, theirs in [
        ("use_dora", own.use_dora, lora.use_dora),
        *((f"scale of {name}", own.scale_of(name), lora.scale_of(name)) for name in there),
        ("layers", sorted(there), sorted(layers)),
        ("modules_to_save", sorted(adapter.copies), sorted(heads.matched(model, lora.modules_to_save))),
    ]:
        if ours != theirs:
            raise ValueError(
                f"the file's adapter has {what} {theirs}, the model's {ours}: load it before shard instead"
            )
    return _values(there, adapter, tensors)


def _config_of(adapter: Adapter) -> LoraConfig:
    assert isinstance(adapter.config, LoraConfig), f"adapter {adapter.name!r} is no LoRA"
    return adapter.config


def _task_of(model: nn.Module, adapter: Adapter) -> str | None:
    """PEFT's task_type. With one of a classifier PEFT expects its heads in the file, whatever modules_to_save says."""
    for task, (kind, names) in TASKS.items():
        if any(task in cls.__name__ for cls in type(model).__mro__):
            return kind if heads.matched(model, names).keys() <= adapter.copies.keys() else None
    if not hasattr(model, "can_generate") or not model.can_generate():
        return None
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


# Configuration #

# Part of a class's name -> (PEFT's task_type, the modules_to_save that it adds).
TASKS = {
    "ForSequenceClassification": ("SEQ_CLS", ("classifier", "score")),
    "ForTokenClassification": ("TOKEN_CLS", ("classifier", "score")),
    "ForQuestionAnswering": ("QUESTION_ANS", ("qa_outputs",)),
}


def _meaning(model: nn.Module, config: dict) -> tuple[LoraConfig, dict[str, nn.Module]]:
    """(the configuration as a LoraConfig, the layers of this model that it targets). ValueError if not supported."""
    _refuse_unsupported(config)
    read = {key: default if config.get(key) is None else config[key] for key, default in READ.items()}
    _check_types(read)
    targets, exclude, whole = read["target_modules"], read["exclude_modules"], read["modules_to_save"]
    apart = heads.matched(model, whole)
    modules = {n: module for n, module in naming.modules_of(model).items() if not naming.is_inside(n, apart)}
    is_pattern = isinstance(targets, str) and targets.lower() != naming.ALL_LINEAR
    if isinstance(targets, str) and not is_pattern:
        _, layers = naming.find(model, naming.ALL_LINEAR, apart)
    else:
        is_meant = _by_layers(targets, read["layers_to_transform"], read["layers_pattern"])
        layers = {name: module for name, module in modules.items() if is_meant(name)}
    layers = {name: layer for name, layer in layers.items() if not exclude or not naming.matches(name, exclude)}
    naming.check(model, layers, f"target_modules={targets!r} of adapter_config.json", apart)
    lora = LoraConfig(
        r=read["r"],
        alpha=read["lora_alpha"],
        dropout=read["lora_dropout"],
        targets=targets if is_pattern and not exclude else naming.shortest(modules, layers),
        use_rslora=read["use_rslora"],
        use_dora=read["use_dora"],
        modules_to_save=tuple(dict.fromkeys(whole)),
        rank_pattern=read["rank_pattern"],
        alpha_pattern=read["alpha_pattern"],
    )
    return lora, layers


def _refuse_unsupported(config: dict) -> None:
    refused = {
        key: value
        for key, value in config.items()
        if key not in READ and key not in WITHOUT_EFFECT and value not in (OFF.get(key), None, False, [], {})
    }
    if config.get("init_lora_weights", True) not in KEEPS_BASE:
        refused["init_lora_weights"] = config["init_lora_weights"]
    if refused:
        told = ", ".join(f"{key}={str(value)[:40]!r}" for key, value in sorted(refused.items()))
        raise ValueError(f"adapter_config.json asks for what is not supported here: {told}; merge it with PEFT instead")


def _check_types(read: dict[str, Any]) -> None:
    def is_names(value: object) -> bool:
        return isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value))

    def is_patterns(value: object) -> bool:
        return isinstance(value, dict) and all(patterns.is_regular(key) for key in value)

    indices, targets = read["layers_to_transform"], read["target_modules"]
    fits = {
        "target_modules": is_names(targets)
        and (patterns.is_regular(targets) if isinstance(targets, str) else len(targets) > 0),
        "exclude_modules": is_names(read["exclude_modules"])
        and (not isinstance(read["exclude_modules"], str) or patterns.is_regular(read["exclude_modules"])),
        "layers_pattern": is_names(read["layers_pattern"])
        and all(patterns.is_regular(pattern) for pattern in _listed(read["layers_pattern"])),
        "layers_to_transform": all(isinstance(i, int) for i in (indices if isinstance(indices, list) else [indices])),
        "rank_pattern": is_patterns(read["rank_pattern"]),
        "alpha_pattern": is_patterns(read["alpha_pattern"]),
        "modules_to_save": is_names(read["modules_to_save"]) and not isinstance(read["modules_to_save"], str),
        "use_rslora": isinstance(read["use_rslora"], bool),
        "use_dora": isinstance(read["use_dora"], bool),
    }
    for key, is_fit in fits.items():
        if not is_fit:
            raise ValueError(f"adapter_config.json has {key}={str(read[key])[:80]!r}, which PEFT does not write there")


def _listed(names: str | list[str]) -> list[str]:
    return [names] if isinstance(names, str) else names


def _by_layers(targets: str | list[str], indices: int | list[int], lists: str | list[str]) -> Callable[[str], bool]:
    """A predicate of module names: PEFT's rule for targets where `layers_to_transform` selects blocks by index."""
    if isinstance(targets, str) or indices == []:
        return lambda name: naming.matches(name, targets)
    indices = indices if isinstance(indices, list) else [indices]
    prefixes = [rf"(?:^|.*?\.){name}" for name in _listed(lists)] or [r".*?\.[^.]*"]

    def is_meant(name: str) -> bool:
        if name in targets:
            return True
        found = next((match for p in prefixes if (match := patterns.match(rf"{p}\.(\d+)\.", name))), None)
        return naming.matches(name, targets) and found is not None and int(found[1]) in indices

    return is_meant


# Tensors #


def _keys(layer_name: str, config: LoraConfig) -> list[tuple[str, str]]:
    """(name of a parameter of the layer's adapter, name of the tensor in the file)."""
    kinds = SUFFIXES if config.use_dora else ("lora_A", "lora_B")
    return [(kind, f"{PREFIX}{layer_name}.{SUFFIXES[kind]}") for kind in kinds]


def _expected(layers: dict[str, nn.Module], config: LoraConfig) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in layers.items():
        (rows, columns), r = matrix(layer).shape, config.rank_of(name)
        shape_of = {"lora_A": (r, columns), "lora_B": (rows, r), "magnitude": (rows,)}
        shapes |= {key: shape_of[kind] for kind, key in _keys(name, config)}
    return shapes


def _shapes_of(modules: dict[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    return {
        f"{PREFIX}{name}.{key}": tuple(parameter.shape)
        for name, module in modules.items()
        for key, parameter in module.named_parameters()
    }


def _check_tensors(expected: dict[str, tuple[int, ...]], tensors: dict[str, Tensor]) -> None:
    problems = [f"no {key}" for key in expected if key not in tensors]
    problems += [f"{key}, which has no place" for key in tensors if key not in expected]
    problems += [
        f"{key} of shape {tuple(tensors[key].shape)} instead of {shape}"
        for key, shape in expected.items()
        if key in tensors and tuple(tensors[key].shape) != shape
    ]
    problems += [f"{key} of {tensor.dtype}" for key, tensor in tensors.items() if not tensor.is_floating_point()]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        told = "; ".join(problems[:4])
        raise ValueError(f"the adapter's tensors are not those of this model and adapter_config.json: {told}{more}")


def _values(layers: dict[str, nn.Module], adapter: Adapter, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    low_ranks = {
        f"{name}.lora.{adapter.name}.{kind}": tensors[key]
        for name in layers
        for kind, key in _keys(name, _config_of(adapter))
    }
    return low_ranks | {name: tensors[PREFIX + key] for name, key in heads.parameter_names(adapter).items()}
