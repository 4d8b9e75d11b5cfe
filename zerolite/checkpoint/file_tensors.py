"""Tensors of which only the places in the files are known: what a conversion makes of them is read by ranges.

transformers' own conversions run on them. They join and cut tensors by the functions of torch below, which move no
element here: the result knows from which ranges of which tensors its elements come, in order. Whatever else a
conversion asks for (a transposition, arithmetic) is an error, and who converts then takes the tensors whole.
"""

import bisect
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from zerolite.shards.layout import Range

if TYPE_CHECKING:
    from zerolite.checkpoint.weight_files import Weights

MAX_EXTENTS = 1 << 14  # of a tensor; reading more, shorter ones one by one takes longer than reading all


class Extent(NamedTuple):
    """Elements of one tensor of the files, flattened."""

    key: str
    range: Range


class FileTensor:
    """A tensor whose elements, in row-major order, are those of `extents`."""

    def __init__(self, shape: Sequence[int], extents: Iterable[Extent]):
        self.shape = torch.Size(shape)
        self.extents: list[Extent] = []
        for extent in extents:
            last = self.extents[-1] if self.extents else None
            if last is not None and last.key == extent.key and last.range.stop == extent.range.start:
                self.extents[-1] = Extent(last.key, Range(last.range.start, extent.range.stop))
            elif extent.range.numel > 0:
                self.extents.append(extent)
            if len(self.extents) > MAX_EXTENTS:
                raise ValueError(f"a tensor of more than {MAX_EXTENTS:,} ranges of the files")
        # Where each extent starts in this tensor, and where the last one ends.
        self.starts = [0, *itertools.accumulate(extent.range.numel for extent in self.extents)]

    @classmethod
    def of(cls, key: str, shape: Sequence[int]) -> "FileTensor":
        """The whole tensor `key`."""
        return cls(shape, [Extent(key, Range(0, math.prod(shape)))])

    @property
    def keys(self) -> list[str]:
        return list(dict.fromkeys(extent.key for extent in self.extents))

    def within(self, elements: Range) -> list[Extent]:
        """The extents of some elements of this tensor."""
        found = []
        for index in range(bisect.bisect_right(self.starts, elements.start) - 1, len(self.extents)):
            (key, own), start = self.extents[index], self.starts[index]
            part = Range(start, start + own.numel).intersect(elements)
            if part.numel > 0:
                found.append(Extent(key, Range(own.start + part.start - start, own.start + part.stop - start)))
            if self.starts[index + 1] >= elements.stop:
                break
        return found

    def read(self, weights: "Weights", elements: Range, out: torch.Tensor) -> None:
        """out (elements.numel,) = these elements of this tensor, flattened."""
        done = 0
        for key, part in self.within(elements):
            weights.read(key, part.start, part.stop, out[done : done + part.numel])
            done += part.numel

    # What transformers' conversions ask of a tensor #

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def size(self, dim: int) -> int:
        return self.shape[dim]

    def numel(self) -> int:
        return self.shape.numel()

    def contiguous(self) -> "FileTensor":
        return self

    def squeeze(self, dim: int) -> "FileTensor":
        dim %= self.ndim
        return self.reshape([*self.shape[:dim], *self.shape[dim + 1 :]]) if self.shape[dim] == 1 else self

    def reshape(self, *shape: Any) -> "FileTensor":
        wanted = torch.empty(self.shape, device="meta").reshape(*shape).shape
        return FileTensor(wanted, self.extents)

    view = reshape

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function not in _FUNCTIONS:
            return NotImplemented
        return _FUNCTIONS[function](*args, **(kwargs or {}))


def _stack(tensors: Sequence[FileTensor], dim: int = 0) -> FileTensor:
    dim %= tensors[0].ndim + 1
    return _cat([tensor.reshape([*tensor.shape[:dim], 1, *tensor.shape[dim:]]) for tensor in tensors], dim)


def _cat(tensors: Sequence[FileTensor], dim: int = 0) -> FileTensor:
    dim %= tensors[0].ndim
    shape = torch.cat([torch.empty(tensor.shape, device="meta") for tensor in tensors], dim).shape
    # A row of the result (all dimensions before `dim` fixed) is a row of each tensor, one after the other.
    extents: list[Extent] = []
    for row in range(math.prod(shape[:dim])):
        for tensor in tensors:
            numel = math.prod(tensor.shape[dim:])
            extents += tensor.within(Range(row * numel, (row + 1) * numel))
        if len(extents) > MAX_EXTENTS * len(tensors):
            break  # refused where the tensor is made
    return FileTensor(shape, extents)


def _split(tensor: FileTensor, split_size_or_sections: int | Sequence[int], dim: int = 0) -> tuple[FileTensor, ...]:
    dim %= tensor.ndim
    shapes = [part.shape for part in torch.empty(tensor.shape, device="meta").split(split_size_or_sections, dim)]
    row_numel, parts, start = math.prod(tensor.shape[dim:]), [], 0
    for shape in shapes:
        numel = math.prod(shape[dim:])
        extents: list[Extent] = []
        for row in range(math.prod(shape[:dim])):
            extents += tensor.within(Range(row * row_numel + start, row * row_numel + start + numel))
            if len(extents) > 2 * MAX_EXTENTS:
                break  # as above
        parts.append(FileTensor(shape, extents))
        start += numel
    return tuple(parts)


def _chunk(tensor: FileTensor, chunks: int, dim: int = 0) -> tuple[FileTensor, ...]:
    return _split(tensor, -(-tensor.shape[dim] // chunks), dim)


def _unbind(tensor: FileTensor, dim: int = 0) -> tuple[FileTensor, ...]:
    return tuple(part.squeeze(dim) for part in _split(tensor, 1, dim))


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    torch.stack: _stack,
    torch.cat: _cat,
    torch.split: _split,
    torch.chunk: _chunk,
    torch.unbind: _unbind,
}
