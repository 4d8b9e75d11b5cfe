"""Crosses of test cases: a covering array by default, all combinations in `make test-full`.

The stacked `parametrize` marks of a test are its axes. With three or more, all combinations are many, and a bug that
needs three values at once is rare: of the combinations so many run that every two values of any two axes meet. Where
two axes hardly depend on each other, `@pytest.mark.each` has every value of each run, and not every two. conftest.py
thins tests out accordingly; `pairs` and `each` do the same to a list that is written out.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence

FULL = os.environ.get("ZEROLITE_TESTS") == "full"  # read here alone


def pairs(*axes: Iterable) -> list[tuple]:
    """Rows with a value of each axis, every two values of two axes in one of them; all rows in a full run."""
    rows = list(itertools.product(*axes))
    return rows if FULL else cover(rows)


def each(*axes: Sequence) -> list[tuple]:
    """As many rows as the longest axis has values, the shorter ones over and over; all rows in a full run."""
    if FULL:
        return list(itertools.product(*axes))
    return [tuple(axis[number % len(axis)] for axis in axes) for number in range(max(map(len, axes)))]


def cover(rows: Sequence[tuple], strength: int = 2) -> list[tuple]:
    """Some of `rows`, in their order: what values meet in one of them, `strength` at a time, meet in one that is left.

    Greedy: next comes the row with most meetings that are new, the first of equals.
    """
    new = [_meetings(row, strength) for row in rows]
    chosen = []
    while any(new):
        best = max(range(len(rows)), key=lambda index: len(new[index]))
        chosen.append(best)
        new = [meetings - new[best] for meetings in new]
    return [rows[index] for index in sorted(chosen)]


def _meetings(row: tuple, strength: int) -> frozenset:
    return frozenset(itertools.combinations(enumerate(row), min(strength, len(row))))
