"""Are the intervals of an evaluation those of the textbook, and does a paired one see what two columns hide?"""

from __future__ import annotations

import numpy as np
import pytest

from zerolite.medqa.evaluation import intervals


def test_wilsons_interval_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    for num_right, num in ((0, 7), (7, 7), (3, 10), (58, 100), (199, 200)):
        expected = stats.binomtest(num_right, num).proportion_ci(method="wilson")
        assert intervals.wilson(num_right, num) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_the_bootstrap_is_scipys_up_to_its_draws():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(1)
    weights = rng.integers(1, 50, 120)
    values = weights * rng.normal(3, 0.4, 120)
    expected = stats.bootstrap(
        (values, weights), lambda v, w, axis: v.sum(axis) / w.sum(axis), paired=True, method="percentile", rng=rng
    ).confidence_interval
    found = intervals.bootstrap(values, weights)
    assert found == pytest.approx((expected.low, expected.high), abs=0.05 * (expected.high - expected.low))
    assert found == intervals.bootstrap(values, weights)


def test_a_paired_difference_is_seen_where_the_intervals_of_the_two_overlap():
    rng = np.random.default_rng(2)
    base = rng.normal(3.0, 1.0, 100)
    model = base - 0.05 + rng.normal(0, 0.1, 100)
    apart = [intervals.bootstrap(one) for one in (model, base)]
    assert apart[0][1] > apart[1][0]
    found = intervals.paired_bootstrap(model, base)
    assert found.excludes_zero and found.low < found.value < found.high < 0
    assert found.value == pytest.approx(model.mean() - base.mean())
    same = intervals.paired_bootstrap(base, base)
    assert (same.low, same.high, same.excludes_zero) == (0, 0, False)


def test_95_of_100_intervals_hold_the_difference_that_is_there(monkeypatch):
    """Of losses a token, where rows have uneven numbers of tokens; 87 to 100 of 100 with probability over 0.999."""
    monkeypatch.setattr(intervals, "NUM_RESAMPLES", 500)
    rng, hits = np.random.default_rng(3), 0
    for _ in range(100):
        weights = rng.integers(5, 60, 80)
        base = weights * rng.normal(3.0, 0.5, 80)
        model = base - weights * rng.normal(0.1, 0.3, 80)
        found = intervals.paired_bootstrap(model, base, weights)
        hits += found.low < -0.1 < found.high
    assert 87 <= hits <= 100
