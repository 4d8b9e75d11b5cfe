"""Nested values of a user's as JSON, with their tensors beside: what a checkpoint's `extra` is on disk."""

import torch

from zerolite.errors import CheckpointError


def pack(value, path: str, tensors: dict[str, torch.Tensor]):
    """`value` as JSON; its tensors go to `tensors` and leave {"tensor": key}. Dicts, lists and tuples are tagged."""
    if isinstance(value, torch.Tensor):
        key = f"extra/{len(tensors)}"
        tensors[key] = value
        return {"tensor": key}
    if isinstance(value, dict):
        if not all(isinstance(name, str) for name in value):
            raise TypeError(f"{path}: keys of dicts in extra are strings, got {list(value)[:4]}")
        return {"dict": {name: pack(item, f"{path}[{name!r}]", tensors) for name, item in value.items()}}
    if isinstance(value, list | tuple):
        items = [pack(item, f"{path}[{index}]", tensors) for index, item in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": items}
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"{path}: extra holds JSON values and tensors, got {type(value).__name__}")


def unpack(value, tensors):
    """What `pack` was given; `tensors`: an open safetensors file. CheckpointError for what `pack` does not make."""
    if not isinstance(value, dict | list):
        return value
    tag, content = next(iter(value.items())) if isinstance(value, dict) and len(value) == 1 else ("", None)
    if tag == "tensor" and isinstance(content, str) and content.startswith("extra/"):
        return tensors.get_tensor(content)
    if tag == "dict" and isinstance(content, dict):
        return {name: unpack(item, tensors) for name, item in content.items()}
    if tag in ("list", "tuple") and isinstance(content, list):
        items = [unpack(item, tensors) for item in content]
        return items if tag == "list" else tuple(items)
    raise CheckpointError(f"the checkpoint's extra is not as zerolite.save writes it (at {str(value)[:60]})")
