"""What the tests themselves rest on: covering arrays cover, and a limit of time waits longer on a busy machine."""

from __future__ import annotations

import itertools
import time

import crosses
import limits
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

axes = st.lists(st.integers(1, 5).map(range), min_size=1, max_size=4)


@settings(deadline=None, max_examples=60, derandomize=True, database=None)
@given(axes=axes, strength=st.integers(1, 3))
def test_a_covering_array_has_every_meeting_and_rows_of_the_product(axes, strength):
    rows = list(itertools.product(*axes))
    chosen = crosses.cover(rows, strength)
    assert len(set(chosen)) == len(chosen) and set(chosen) <= set(rows) and chosen == sorted(chosen)
    for places in itertools.combinations(range(len(axes)), min(strength, len(axes))):
        met = {tuple(row[place] for place in places) for row in chosen}
        assert met == set(itertools.product(*(axes[place] for place in places)))


@settings(deadline=None, max_examples=60, derandomize=True, database=None)
@given(axes=axes)
def test_pairs_and_each_by_default_and_in_a_full_run(axes):
    product = list(itertools.product(*axes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crosses, "FULL", True)
        assert crosses.pairs(*axes) == crosses.each(*axes) == product
        patch.setattr(crosses, "FULL", False)
        assert crosses.pairs(*axes) == crosses.cover(product)
        rows = crosses.each(*axes)
        assert len(rows) == max(map(len, axes)) and [set(axis) for axis in axes] == [set(v) for v in zip(*rows)]  # noqa: B905


def test_pairs_of_an_incomplete_cross():
    """Rows that are not there are not asked for."""
    rows = [(a, b, c) for a, b, c in itertools.product(range(3), repeat=3) if a != b]
    chosen = crosses.cover(rows)
    assert {row[:2] for row in chosen} == {row[:2] for row in rows} and len(chosen) < len(rows)


def test_parity_runs_a_quarter_of_its_cross():
    assert len(crosses.cover(list(itertools.product(range(6), range(4), range(4))))) == 24


def test_a_second_of_a_limit_is_longer_where_processes_wait(monkeypatch):
    assert limits.load() >= 1.0
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(limits, "load", lambda: 4.0)
    limit = limits.Limit(10.0)
    now += 38.0
    assert not limit.is_over() and limit.left == 0.5
    monkeypatch.setattr(limits, "load", lambda: 1.0)
    now += 0.25
    assert not limit.is_over()
    now += 0.25
    assert limit.is_over()


def test_until_tells_what_came_true():
    answers = iter([False, True])
    assert limits.until(lambda: next(answers), 60.0)
    assert not limits.until(lambda: False, 0.0)
