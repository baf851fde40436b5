"""Means over seeds and rows with their errors, and what a difference between two methods is worth.

Two things vary by chance: the training (its seed) and the held-out rows. A figure that is measured by row and by seed
is a matrix; its error counts both, and a difference is taken seed by seed and row by row before anything is averaged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from tasks.stats.standard_errors import is_zero

RESAMPLES = 2000
BOOTSTRAP_SEED = 0


@dataclass(frozen=True)
class Estimate:
    """A mean, or a mean difference."""

    value: float
    stderr: float | None
    """One standard error; none where nothing was repeated."""
    interval: tuple[float, float] | None
    """Where the true value lies, at the stated confidence, by quantiles of Student's t."""
    bootstrap: tuple[float, float] | None = None
    """The same by resampling, where there are rows."""
    repeated: bool = True
    """Whether there was more than one seed; else the error counts rows alone, and speaks of these trainings only."""

    @property
    def exceeds_error(self) -> bool:
        """Whether 0 lies outside of every interval. One seed tells no error, nor do values that are all equal."""
        intervals = [interval for interval in (self.interval, self.bootstrap) if interval is not None]
        spread = self.stderr is not None and not is_zero(self.stderr, self.value)
        return self.repeated and spread and all(low > 0 or high < 0 for low, high in intervals)


def over_seeds(values: ArrayLike, confidence: float) -> Estimate:
    """The mean of one figure for each seed.

    Args:
        values: [S].
        confidence: of the interval, e.g. 0.95.
    """
    of_seeds = np.asarray(values, dtype=float)
    mean = float(of_seeds.mean())
    if len(of_seeds) < 2:
        return Estimate(mean, None, None, repeated=False)
    stderr = float(of_seeds.std(ddof=1)) / math.sqrt(len(of_seeds))
    half = _quantile(len(of_seeds) - 1, confidence) * stderr
    return Estimate(mean, stderr, (mean - half, mean + half))


def over_seeds_and_rows(sums: ArrayLike, counts: ArrayLike, confidence: float) -> Estimate:
    """A ratio of sums over rows, such as nats per supervised token, averaged over seeds.

    The variance is that of a two-way layout with both ways random: by rows (linearised ratio estimator: Cochran,
    Sampling Techniques, 3rd ed. 1977, section 6.3) plus by seeds, less what is in both. With few seeds their part is
    itself badly known, so the interval takes each part with its own quantile (modified large-sample interval: Graybill
    and Wang, J. Am. Stat. Assoc. 75, 1980). The bootstrap draws rows and seeds at a time (Owen, Annals of Applied
    Statistics 1, 2007); with few seeds it is too narrow, so that it only ever speaks beside the other.

    Args:
        sums: [S, R], of each seed and row; [1, R] for what has no seed: then only rows count as chance.
        counts: [R], what each row's sum is divided by: supervised tokens, or ones.
        confidence: of the intervals.
    """
    x, n = np.atleast_2d(np.asarray(sums, dtype=float)), np.asarray(counts, dtype=float)
    seeds, rows = x.shape
    total = n.sum()
    value = float(x.sum() / (seeds * total))
    if rows < 2:
        return over_seeds(x.sum(axis=1) / total, confidence)
    residuals = (x - n * value) / total
    by_row, by_seed = residuals.mean(axis=0), residuals.sum(axis=1)
    of_rows = rows / (rows - 1) * float((by_row**2).sum())
    rows_quantile = _quantile(rows - 1, confidence)
    variance, half = of_rows, rows_quantile * math.sqrt(of_rows)
    if seeds > 1:
        of_seeds = float((by_seed**2).sum()) / (seeds - 1) / seeds
        rest = residuals - by_row - by_seed[:, None] * (n / total)
        of_both = rows / (rows - 1) * float((rest**2).sum()) / (seeds - 1) / seeds
        seeds_quantile = _quantile(seeds - 1, confidence)
        variance = max(of_rows + of_seeds - of_both, of_rows, of_seeds)
        squares = (rows_quantile**2 * of_rows, seeds_quantile**2 * of_seeds)
        half = math.sqrt(max(sum(squares) - seeds_quantile**2 * of_both, *squares))
    interval = value - half, value + half
    return Estimate(value, math.sqrt(variance), interval, _bootstrap(x, n, confidence), repeated=seeds > 1)


def paired(values: ArrayLike, reference: ArrayLike, counts: ArrayLike | None, confidence: float) -> Estimate:
    """The difference `values` - `reference`, paired by seed and, with counts, by row.

    Args:
        values: [S] or, with counts, [S, R].
        reference: the same; [1, R] for something that has no seed, such as the base model.
        counts: [R], or none for figures without rows.
        confidence: of the intervals.
    """
    difference = np.asarray(values, dtype=float) - np.asarray(reference, dtype=float)
    if counts is None:
        return over_seeds(difference, confidence)
    return over_seeds_and_rows(difference, counts, confidence)


def _quantile(freedom: int, confidence: float) -> float:
    return float(stats.t.ppf((1 + confidence) / 2, freedom))


def _bootstrap(sums: np.ndarray, counts: np.ndarray, confidence: float) -> tuple[float, float]:
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    seeds, rows = sums.shape
    of_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES)
    of_rows = generator.multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES)
    values = ((of_seeds @ sums) * of_rows).sum(axis=1) / (seeds * (of_rows @ counts))
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
