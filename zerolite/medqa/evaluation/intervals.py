"""95 % intervals: Wilson's of a share, the bootstrap's of a mean over rows, the paired bootstrap's of a difference."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 10_000
SEED = 0
Z = 1.959963984540054  # of 95 %
CHUNK_NUMBERS = 1 << 22  # of the counts of resamples that are there at once


@dataclass(frozen=True)
class Difference:
    """A measure of a model less that of its base, on the same rows."""

    model: float
    base: float
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.model - self.base

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def wilson(num_right: int, num: int) -> tuple[float, float]:
    """Wilson's score interval of a share."""
    share, part = num_right / num, Z**2 / num
    middle = (share + part / 2) / (1 + part)
    half = Z * math.sqrt(share * (1 - share) / num + part / (4 * num)) / (1 + part)
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(values: Sequence[float], weights: Sequence[float] | None = None) -> tuple[float, float]:
    """Of sum(values) / sum(weights), rows drawn with replacement (percentiles). weights: 1 a row by default."""
    columns = _columns(values, weights)
    found = [sums[:, 0] / sums[:, 1] for sums in _resampled(columns)]
    return _percentiles(np.concatenate(found))


def paired_bootstrap(
    model: Sequence[float], base: Sequence[float], weights: Sequence[float] | None = None
) -> Difference:
    """As `bootstrap`, of the difference; a resample has the same rows of both, which share `weights`."""
    columns = np.concatenate([_columns(model, weights), _columns(base, weights)], axis=1)
    found = [sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3] for sums in _resampled(columns)]
    totals = columns.sum(axis=0)
    return Difference(totals[0] / totals[1], totals[2] / totals[3], *_percentiles(np.concatenate(found)))


def _columns(values: Sequence[float], weights: Sequence[float] | None) -> np.ndarray:
    """(rows, 2) float64"""
    weights = np.ones(len(values)) if weights is None else weights
    return np.stack([np.asarray(values, np.float64), np.asarray(weights, np.float64)], axis=1)


def _resampled(columns: np.ndarray) -> Iterator[np.ndarray]:
    """Sums of the columns over resamples, some resamples at a time; the same ones in every call with as many rows."""
    rng, num_rows = np.random.default_rng(SEED), len(columns)
    at_once = max(1, CHUNK_NUMBERS // num_rows)
    for start in range(0, NUM_RESAMPLES, at_once):
        num = min(at_once, NUM_RESAMPLES - start)
        counts = rng.multinomial(num_rows, np.full(num_rows, 1 / num_rows), size=num)
        yield counts @ columns


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
