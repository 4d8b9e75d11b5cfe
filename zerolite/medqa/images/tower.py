"""The part of a model that sees: found by what its classes say they read, frozen but for its projector."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

# Inside of a tower: what takes its features to the language model's, as projectors beside a tower do.
PROJECTORS = ("merger", "deepstack_merger_list")


def towers_of(model: nn.Module) -> list[str]:
    """Names of the models inside of a model that read no text, the outermost ones."""
    found: list[str] = []
    for name, module in model.named_modules():
        inputs = getattr(module, "input_modalities", "text") if isinstance(module, PreTrainedModel) else "text"
        if "text" not in inputs and not any(name.startswith(f"{tower}.") for tower in found):
            found.append(name)
    return found


def freeze(model: nn.Module) -> None:
    """Freeze the towers of a model; projectors and the language model stay as they are."""
    for tower in towers_of(model):
        for name, parameter in model.get_submodule(tower).named_parameters():
            if name.split(".")[0] not in PROJECTORS:
                parameter.requires_grad_(False)


def freeze_sight(model: PreTrainedModel) -> None:
    """Freeze all that texts do not pass through: without a gradient, weight decay alone would change it."""
    reads_text = [*model.get_decoder().parameters(), *model.get_output_embeddings().parameters()]
    kept = set(map(id, reads_text))
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)


def outside(model: nn.Module, names: Sequence[str]) -> str:
    """A regular expression for the linear layers that end in one of `names`, or for all of them, but in no tower.

    `names`: ("all-linear",) stands for every one but the output head. A model without a tower gets one as well.
    """
    towers, head = towers_of(model), model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and not any(name.startswith(f"{tower}.") for tower in towers)
        and (tuple(names) == ("all-linear",) or any(name == end or name.endswith(f".{end}") for end in names))
    ]
    return "|".join(re.escape(name) for name in found)
