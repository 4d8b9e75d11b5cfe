"""Do tensors of which only places are known come out as torch's own do?"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch

from zerolite.checkpoint import file_tensors
from zerolite.checkpoint.file_tensors import FileTensor
from zerolite.shards.layout import Range


class Files:
    """Tensors of known numbers in place of a folder's."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.numel = 0

    def new(self, shape: list[int]) -> FileTensor:
        key, numel = f"t{len(self.tensors)}", math.prod(shape)
        self.tensors[key] = torch.arange(self.numel, self.numel + numel).reshape(shape)
        self.numel += numel
        return FileTensor.of(key, shape)

    def read(self, key: str, start: int, stop: int, out: torch.Tensor) -> None:
        out.copy_(self.tensors[key].reshape(-1)[start:stop])


def draw(rng: random.Random, files: Files) -> tuple[FileTensor, torch.Tensor]:
    """A random conversion of two to four steps, carried out on both kinds."""
    dims = rng.randint(1, 3)
    shape = [rng.choice([1, 2, 4, 6]) for _ in range(dims)]
    mine = [files.new(shape) for _ in range(rng.randint(1, 3))]
    others = [files.tensors[tensor.extents[0].key] for tensor in mine]
    for _ in range(rng.randint(2, 4)):
        dim = rng.randrange(mine[0].ndim)
        step: Callable = rng.choice(
            [
                lambda ts, dim=dim: [torch.stack(ts, dim=dim)],
                lambda ts, dim=dim: [torch.cat(ts, dim=dim)],
                lambda ts, dim=dim: [part for t in ts for part in torch.chunk(t, 2, dim=dim)],
                lambda ts, dim=dim: [part.contiguous() for t in ts for part in torch.unbind(t, dim=dim)],
                lambda ts: [t.reshape(-1, t.shape[-1]) for t in ts],
                lambda ts, dim=dim: [torch.split(t, [1, t.shape[dim] - 1], dim=dim)[0] for t in ts],
            ]
        )
        if len({tensor.shape for tensor in others}) > 1:
            break
        made = step(others)
        if any(tensor.ndim == 0 or tensor.numel() == 0 for tensor in made):
            continue
        mine, others = step(mine), made
    index = rng.randrange(len(mine))
    return mine[index], others[index]


@pytest.mark.parametrize("seed", range(200))
def test_joined_and_cut_tensors_hold_what_torch_gives(seed):
    """Shape, all elements, and elements of a range, of random conversions."""
    rng, files = random.Random(seed), Files()
    mine, other = draw(rng, files)
    assert mine.shape == other.shape
    start = rng.randrange(other.numel())
    for elements in (Range(0, other.numel()), Range(start, rng.randint(start, other.numel()))):
        out = torch.full((elements.numel,), -1)
        mine.read(files, elements, out)
        assert torch.equal(out, other.reshape(-1)[elements.start : elements.stop])


def test_what_moves_elements_is_no_operation_of_theirs(monkeypatch):
    files = Files()
    with pytest.raises(TypeError):
        torch.transpose(files.new([2, 3]), 0, 1)
    with pytest.raises(AttributeError):
        files.new([2, 3]).transpose(0, 1)
    with pytest.raises(RuntimeError):
        torch.cat([files.new([2, 3]), files.new([2, 2])], dim=0)
    monkeypatch.setattr(file_tensors, "MAX_EXTENTS", 3)
    with pytest.raises(ValueError, match="more than 3 ranges"):
        torch.cat([files.new([4, 3]), files.new([4, 3])], dim=1)
    with pytest.raises(ValueError, match="more than 3 ranges"):
        torch.chunk(files.new([4, 4]), 2, dim=1)
