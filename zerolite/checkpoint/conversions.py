"""Of which tensors of a Hugging Face folder each parameter is made, by transformers' own tables and operations.

[Note: conversions]

transformers 5 renames and converts on load: vision-language folders have other names than their models, mixtures of
experts are files of single experts. Its tables (`conversion_mapping.py`) say how, and we keep none of our own. The
names go through them as `from_pretrained` sends them. The operations then run on `FileTensor`s, which move no element:
joined and cut tensors (stacked experts, fused gates, split projections) are read by the ranges that a rank needs. Other
operations (a transposition, a permutation for rotary positions) need their tensors whole: those of one conversion at a
time are read, converted on the host, and dropped.
"""

import copy
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
import transformers
from torch import nn

from zerolite.checkpoint.file_tensors import FileTensor
from zerolite.checkpoint.weight_files import Weights
from zerolite.shards.layout import Range

COMPARED_NUMEL = 1 << 22  # of two tensors in the files, at a time


class Source(Protocol):
    """Where the values of one parameter or buffer come from."""

    shape: torch.Size

    @property
    def keys(self) -> Sequence[str]:
        """The tensors of the files."""

    def read(self, weights: Weights, elements: Range, out: torch.Tensor) -> None:
        """out (elements.numel,) = these elements of the flattened parameter."""


class Conversion:
    """A converter of transformers, and the tensors of the files that it is for."""

    def __init__(self, model: nn.Module, converter: Any, first: str):
        self.model = model
        self.converter = converter
        self.first = first  # of the names that it makes
        self.tensors: list[tuple[str, str]] = []  # key in the files, and the pattern that it matched

    @property
    def keys(self) -> list[str]:
        return [key for key, _ in self.tensors]

    def run(self, tensor_of: Callable[[str], Any]) -> dict[str, Any]:
        """What it makes, by name, of tensors of any kind that its operations take."""
        converter = copy.deepcopy(self.converter)
        for key, pattern in self.tensors:
            converter.add_tensor(self.first, key, pattern, tensor_of(key))
        made = converter.convert(self.first, model=self.model, config=self.model.config)
        return {name: found[0] if isinstance(found, list) else found for name, found in made.items()}

    def __str__(self) -> str:
        """How many tensors it has of each pattern."""
        patterns = [pattern for _, pattern in self.tensors]
        return ", ".join(f"{pattern} ({patterns.count(pattern)})" for pattern in dict.fromkeys(patterns))


class WholeConversions:
    """Conversions that take whole tensors: what the last one made stays until the next one runs."""

    def __init__(self):
        self.last: tuple[Conversion, dict[str, torch.Tensor]] | None = None

    def made(self, conversion: Conversion, weights: Weights) -> dict[str, torch.Tensor]:
        if self.last is None or self.last[0] is not conversion:
            self.last = None
            self.last = conversion, conversion.run(weights.whole)
        return self.last[1]


class WholeSource:
    """What a conversion makes of whole tensors."""

    def __init__(self, conversions: WholeConversions, conversion: Conversion, name: str, shape: torch.Size):
        self.conversions = conversions
        self.conversion = conversion
        self.name = name
        self.shape = shape

    @property
    def keys(self) -> list[str]:
        return self.conversion.keys

    def read(self, weights: Weights, elements: Range, out: torch.Tensor) -> None:
        if elements.numel > 0:
            out.copy_(elements.of(self.conversions.made(self.conversion, weights)[self.name].reshape(-1)))


def transformers_sources(model: transformers.PreTrainedModel, weights: Weights) -> dict[str, Source]:
    """By name in the state dict, of a model without adapters; `model` learns which conversions `export` undoes.

    ValueError where a conversion cannot be done with the tensors that are there. ImportError where transformers has no
    tables that are known here.
    """
    transforms, conversions, named = _match(model, weights)
    sources: dict[str, Source] = {name: FileTensor.of(key, weights.shape(key)) for name, key in named.items()}
    whole = WholeConversions()
    for conversion in conversions:
        sources.update(_sources_of(conversion, weights, whole))
    model._weight_conversions = [transform for transform in transforms if transform.was_used()]
    _resolve_ties(model, sources, weights)
    return sources


def _match(model: transformers.PreTrainedModel, weights: Weights) -> tuple[list, list[Conversion], dict[str, str]]:
    """Transforms, conversions with their tensors, and the key of each name that needs none.

    The order, and which of two claims counts, are those of `convert_and_load_state_dict_in_model`.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightTransform, dot_natural_key, rename_source_key

        WeightTransform.was_used  # noqa: B018
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"load_pretrained reads the conversion tables of transformers, and {transformers.__version__} has others "
            f"({error}): install transformers 5.17 or newer, or build the model with from_pretrained and give it to "
            "zerolite.shard"
        ) from error
    transforms = get_model_conversion_mapping(model)
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    renamings = [transform for transform in transforms if not isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix, expected = model.base_model_prefix, model.state_dict()
    named: dict[str, str] = {}
    conversions: dict[str, Conversion] = {}
    for key in sorted(weights.entries, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, expected)
        if name not in expected and key in expected:
            name, pattern = rename_source_key(key, [], [], prefix, expected)
        if name not in expected:
            continue
        weights.check_dtype(key, expected[name].dtype)
        if name in conversions:
            conversions[name].tensors.append((key, pattern or key))
        elif pattern is None:
            named.setdefault(name, key)
        elif name not in named:
            conversions[name] = Conversion(model, by_pattern[pattern], name)
            conversions[name].tensors.append((key, pattern))
    return transforms, list(conversions.values()), named


def _sources_of(conversion: Conversion, weights: Weights, whole: WholeConversions) -> Iterator[tuple[str, Source]]:
    """What one conversion makes: read by ranges where its operations only join and cut, else whole."""
    try:
        made = conversion.run(lambda key: FileTensor.of(key, weights.shape(key)))
    except Exception:  # an operation that FileTensor has not, or that fails on any tensor
        made = {}
    if made and all(isinstance(found, FileTensor) for found in made.values()):
        yield from made.items()
        return
    try:
        made = conversion.run(lambda key: torch.empty(weights.shape(key), device="meta"))
    except Exception as error:  # whatever an operation happens to hit
        raise ValueError(
            f"{weights.folder}: {conversion.first} cannot be made of {conversion}: {type(error).__name__}: {error}. "
            "Files are missing, or config.json is of another model: download all of it"
        ) from error
    operations = ", ".join(type(operation).__name__ for operation in conversion.converter.operations)
    logging.getLogger(__name__).info(
        "%s is read whole by every rank that needs of it: %s", conversion.first, operations
    )
    for name, found in made.items():
        yield name, WholeSource(whole, conversion, name, found.shape)


# Tied parameters #


def _resolve_ties(model: transformers.PreTrainedModel, sources: dict[str, Source], weights: Weights) -> None:
    """Every name of a tied parameter gets the source of the one that transformers ties from.

    Where the files hold both, with other values, they are not tied, as in `from_pretrained`.
    """
    ties = model.all_tied_weights_keys
    for target, source in list(ties.items()):
        if target in sources and source in sources and not _same_values(sources[target], sources[source], weights):
            parent, _, name = target.rpartition(".")
            own = model.get_parameter(target)
            setattr(model.get_submodule(parent), name, nn.Parameter(torch.empty_like(own), own.requires_grad))
            del ties[target]
    names: defaultdict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    for tied in names.values():
        found = [name for name in sorted(tied, key=lambda name: name in ties) if name in sources]
        if found:
            sources.update(dict.fromkeys(tied, sources[found[0]]))


def _same_values(one: Source, other: Source, weights: Weights) -> bool:
    if one.shape != other.shape:
        return False
    numel = one.shape.numel()
    for start in range(0, numel, COMPARED_NUMEL):
        part = Range(start, min(start + COMPARED_NUMEL, numel))
        mine, others = (torch.empty(part.numel, dtype=torch.float64) for _ in range(2))
        one.read(weights, part, mine)
        other.read(weights, part, others)
        if not torch.equal(mine, others):
            return False
    return True


def ignored(model: nn.Module, keys: Sequence[str]) -> set[str]:
    """Keys of the files that the model's class leaves out by design, as `from_pretrained` does."""
    patterns = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    buffers = [name for name, _ in model.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.add(r"(^|\.)position_ids$")
    return {key for key in keys if any(re.search(pattern, key) for pattern in patterns)}
