"""Tensors inside arguments and outputs: pytree's containers, and dataclasses, which pytree takes for leaves."""

import copy
import dataclasses
from collections.abc import Callable

import torch
from torch.utils import _pytree as pytree


def tensors_of(tree) -> list[torch.Tensor]:
    """The tensors in nested containers and dataclasses."""
    tensors: list[torch.Tensor] = []
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            tensors.append(leaf)
        elif _is_dataclass(leaf):
            tensors += tensors_of(list(_fields_of(leaf).values()))
    return tensors


def map_tree(function: Callable[[torch.Tensor], torch.Tensor], tree):
    """The tree with `function` of each tensor; dataclasses in which something changes are copied."""

    def map_leaf(leaf):
        if isinstance(leaf, torch.Tensor):
            return function(leaf)
        if not _is_dataclass(leaf):
            return leaf
        before = _fields_of(leaf)
        tensors = tensors_of(list(before.values()))
        after = map_tree(function, before)
        if all(new is old for new, old in zip(tensors_of(list(after.values())), tensors, strict=True)):
            return leaf
        mapped = copy.copy(leaf)
        for name, value in after.items():
            object.__setattr__(mapped, name, value)  # frozen ones too
        return mapped

    return pytree.tree_map(map_leaf, tree)


def _is_dataclass(leaf) -> bool:
    return dataclasses.is_dataclass(leaf) and not isinstance(leaf, type)


def _fields_of(leaf) -> dict:
    return {f.name: getattr(leaf, f.name) for f in dataclasses.fields(leaf) if hasattr(leaf, f.name)}
