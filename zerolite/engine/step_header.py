"""What an exchange of gradients begins with: numbers that must be alike on every rank, of what it ran and was told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from zerolite.errors import ZeroliteError
from zerolite.runtime.rank_errors import Ranks
from zerolite.runtime.rank_settings import difference

if TYPE_CHECKING:
    from zerolite.engine.engine import Engine

WIDTH = 4  # numbers of a header


class Told(Protocol):
    """What an optimizer was told."""

    def numbers(self) -> list[float | torch.Tensor]:
        """Two that tell other settings apart."""

    def in_words(self) -> dict[str, str]: ...


def header_of(engine: Engine, told: Told | None) -> list[float | torch.Tensor]:
    """WIDTH numbers of this rank; `told`: of the optimizer that steps, None where somebody asks for a norm."""
    of_optimizer = told.numbers() if told is not None else [0.0, 0.0]
    return [float(engine.gather_order_hash), engine.handles.digest(), *of_optimizer]


def numbers_of(engine: Engine, told: Told | None) -> list[float]:
    """`header_of` on the host, which waits for the device where a number lies there."""
    return [float(number) for number in header_of(engine, told)]


def compare_headers(
    engine: Engine, told: Told | None, headers: Sequence[Sequence[float]], ranks: Ranks | None = None
) -> None:
    """ZeroliteError on every rank, naming both values, where the ranks' headers differ. Collective.

    ranks: that the headers are of; None: those of other data.
    """
    columns = [{str(number) for number in column} for column in zip(*headers, strict=True)]  # NaN is NaN
    gathers, scales, *of_optimizer = (len(column) > 1 for column in columns)
    engine.gather_order_hash = 0
    if gathers:
        raise ZeroliteError(
            "ranks gathered other parameters, or in another order, since the last step: at stage 3 every rank must run "
            "the same modules in the same order; use a lower stage, or units= whose choice does not depend on the data"
        )
    if scales:
        raise ZeroliteError(
            "ranks scaled gradients by other factors: a gradient is one over all ranks, so each must clip, unscale or "
            "multiply the same parameters' .grad by the same numbers, or none"
        )
    if any(of_optimizer):
        words = told.in_words() if told is not None else {"optimizer": "none"}
        raise difference(ranks or engine, "the optimizer", words)
