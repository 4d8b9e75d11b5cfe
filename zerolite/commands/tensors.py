"""Tensors as files describe them, by name, dtype and shape; none is loaded. Tables of them, layers put together."""

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from zerolite.commands.command_line import bytes_told, count_told, shown, table

WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
NAMES = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}
MAX_ROWS = 40  # of a table on a terminal; --json has all


class Tensor(NamedTuple):
    name: str
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * WIDTHS.get(self.dtype, 1)


class Group(NamedTuple):
    """Tensors of one name, shape and dtype in several layers."""

    name: str  # numbers of layers are *
    dtype: str
    shape: tuple[int, ...]
    num_tensors: int
    nbytes: int

    @property
    def numel(self) -> int:
        return self.num_tensors * math.prod(self.shape)


def tensors_of(handle: Any) -> Iterator[Tensor]:
    """What an open safetensors file holds."""
    for name in handle.keys():
        part = handle.get_slice(name)
        yield Tensor(name, part.get_dtype(), tuple(part.get_shape()))


def tensors_of_file(path: Path) -> list[Tensor]:
    """ValueError, with the file, for one that is truncated or none."""
    try:
        with safe_open(path, framework="numpy") as handle:
            return list(tensors_of(handle))
    except SafetensorError as error:
        raise ValueError(f"{path}: is truncated or no safetensors file ({error})") from error


def grouped(tensors: Iterable[Tensor]) -> list[Group]:
    """In the order of the first of each; those of every layer together."""
    found: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
    for tensor in tensors:
        key = (re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", tensor.name), tensor.dtype, tensor.shape)
        sizes = found.setdefault(key, [0, 0])
        sizes[0] += 1
        sizes[1] += tensor.nbytes
    return [Group(*key, *sizes) for key, sizes in found.items()]


def dtype_told(dtype: str) -> str:
    return NAMES.get(dtype, dtype.lower())


def dtypes_told(tensors: Iterable[Tensor]) -> str:
    """As "bf16", or "bf16 and fp32 (12 of 300)"."""
    counts: dict[str, int] = {}
    for tensor in tensors:
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + 1
    ordered = sorted(counts, key=counts.__getitem__, reverse=True)
    total = sum(counts.values())
    told = [dtype_told(ordered[0])] if ordered else ["none"]
    return " and ".join([*told, *(f"{dtype_told(dtype)} ({counts[dtype]} of {total})" for dtype in ordered[1:])])


def groups_table(groups: list[Group]) -> str:
    """Rows of a terminal; a longer table ends in how many are left out."""
    rows = [("name", "tensors", "shape", "dtype", "numbers", "bytes")]
    for group in groups[:MAX_ROWS]:
        shape = " x ".join(map(str, group.shape)) or "scalar"
        sizes = (count_told(group.numel), bytes_told(group.nbytes))
        rows.append((shown(group.name, 72), str(group.num_tensors), shape, dtype_told(group.dtype), *sizes))
    text = table(
        [tuple(f"  {cell}" if not at else cell for at, cell in enumerate(row)) for row in rows], right=(1, 4, 5)
    )
    return text if len(groups) <= MAX_ROWS else f"{text}\n  and {len(groups) - MAX_ROWS} more: --json has all"


def group_json(group: Group) -> dict[str, Any]:
    return {**group._asdict(), "shape": list(group.shape), "numel": group.numel}
