"""Tensors of a model under the names and in the shapes that `save_pretrained` writes, some at a time.

The way back of conversions.py, [Note: conversions]. transformers reverts a whole state dict at once; here come the
tensors of one unit after the other. Those that one conversion takes together wait for each other.
"""

from collections import defaultdict
from collections.abc import Mapping

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key, revert_weight_conversion


class Reversal:
    """Reverts the conversions that the model was loaded by; of one that was not loaded, those of its class."""

    def __init__(self, model: nn.Module, described: Mapping[str, torch.Tensor]):
        """described: all that will be added, on the meta device, by name in the state dict."""
        self.model = model
        left_out = getattr(model, "_keys_to_ignore_on_save", None) or ()
        self.described = {name: tensor for name, tensor in described.items() if name not in left_out}
        self.converts = isinstance(model, transformers.PreTrainedModel)
        self.group_of = _groups(model, self.described) if self.converts else {}
        self.waiting: dict[str, torch.Tensor] = {}

    def add(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What can be written now, by its name in the files; tensors that the class does not save are dropped."""
        self.waiting.update({name: tensor for name, tensor in tensors.items() if name in self.described})
        complete = [name for name in self.waiting if all(other in self.waiting for other in self._together(name))]
        ready = {name: self.waiting.pop(name) for name in complete}
        return revert_weight_conversion(self.model, ready) if self.converts else ready

    def expected(self) -> set[str]:
        """The names that the files have in the end."""
        return set(revert_weight_conversion(self.model, self.described) if self.converts else self.described)

    def _together(self, name: str) -> list[str]:
        return self.group_of.get(name, [name])


def _groups(model: transformers.PreTrainedModel, names: Mapping[str, torch.Tensor]) -> dict[str, list[str]]:
    """Of every tensor that is converted: those that its conversion takes."""
    transforms = getattr(model, "_weight_conversions", None)
    if transforms is None:
        transforms = get_model_conversion_mapping(model, add_legacy=False)
    converters = [t.reverse_transform() for t in reversed(transforms) if isinstance(t, WeightConverter)]
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in names if converters else ():
        made, pattern = rename_source_key(name, [], converters)
        if pattern is not None:
            groups[made].append(name)
    return {name: group for group in groups.values() for name in group}
