"""Crosses of test cases: all pairs by default, all combinations in `make test-full`.

The stacked `parametrize` marks of a test are its axes. With three or more, a bug that needs three values at once is
rare, and all their combinations are many; so of the combinations a covering array runs, in which every two values of
any two axes meet. conftest.py thins each test out by itself: nothing is to be written at the test.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence

FULL = os.environ.get("ZEROLITE_TESTS") == "full"  # read here alone


def pairs(*axes: Iterable) -> list[tuple]:
    """Rows with a value of each axis: every pair of values of two axes is in one; all there are in a full run."""
    rows = list(itertools.product(*axes))
    return rows if FULL else cover(rows)


def each(*axes: Sequence) -> list[tuple]:
    """Rows as many as the longest axis, the shorter ones over and over: every value is in one; all in a full run.

    For axes that hardly depend on each other, or where another test looks at their pairs.
    """
    if FULL:
        return list(itertools.product(*axes))
    rows, length = [], max(map(len, axes))
    for number in range(length):
        rows.append(tuple(axis[number % len(axis)] for axis in axes))
    return rows


def cover(rows: Sequence[tuple], strength: int = 2) -> list[tuple]:
    """Some of `rows`, in their order, in which all values meet that meet in `rows`, so many at a time.

    Greedy: next comes the row with most meetings that are new, the first of equals.
    """
    left = [_meetings(row, strength) for row in rows]
    chosen = []
    while True:
        best = max(range(len(rows)), key=lambda index: len(left[index]), default=None)
        if best is None or not left[best]:
            return [rows[index] for index in sorted(chosen)]
        chosen.append(best)
        new = left[best]
        left = [meetings - new for meetings in left]


def _meetings(row: tuple, strength: int) -> frozenset:
    return frozenset(itertools.combinations(enumerate(row), min(strength, len(row))))
