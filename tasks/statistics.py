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

RESAMPLES = 2000
BOOTSTRAP_SEED = 0


@dataclass(frozen=True)
class Estimate:
    """A mean, or a mean difference."""

    value: float
    stderr: float | None
    """One standard error; none where nothing was repeated."""
    interval: tuple[float, float] | None
    """Where the true value lies, at the stated confidence: Student's t."""
    bootstrap: tuple[float, float] | None = None
    """The same by resampling, where there are rows."""

    @property
    def exceeds_error(self) -> bool:
        """Whether 0 lies outside of every interval."""
        known = [interval for interval in (self.interval, self.bootstrap) if interval is not None]
        return self.interval is not None and all(low > 0 or high < 0 for low, high in known)


def over_seeds(values: ArrayLike, confidence: float) -> Estimate:
    """The mean of one figure for each seed.

    Args:
        values: [S].
        confidence: of the interval, e.g. 0.95.
    """
    each = np.asarray(values, dtype=float)
    mean = float(each.mean())
    if len(each) < 2:
        return Estimate(mean, None, None)
    stderr = float(each.std(ddof=1)) / math.sqrt(len(each))
    return Estimate(mean, stderr, _interval(mean, stderr, len(each) - 1, confidence))


def over_seeds_and_rows(sums: ArrayLike, counts: ArrayLike, confidence: float) -> Estimate:
    """A ratio of sums over rows, such as nats per supervised token, averaged over seeds.

    The variance is that of a two-way layout with both ways random: by rows (linearised ratio estimator: Cochran,
    Sampling Techniques, 3rd ed. 1977, section 6.3) plus by seeds, less what is in both; degrees of freedom after
    Satterthwaite (Biometrics Bulletin 2, 1946). The bootstrap draws rows and seeds at a time (Owen, Annals of Applied
    Statistics 1, 2007); with few seeds it is too narrow, so that it only ever speaks beside Student's t.

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
    variance, freedom = of_rows, float(rows - 1)
    if seeds > 1:
        of_seeds = float((by_seed**2).sum()) / (seeds - 1) / seeds
        rest = residuals - by_row - by_seed[:, None] * (n / total)
        of_both = rows / (rows - 1) * float((rest**2).sum()) / (seeds - 1) / seeds
        variance = max(of_rows + of_seeds - of_both, of_rows, of_seeds)
        parts = of_rows**2 / (rows - 1) + of_seeds**2 / (seeds - 1)
        freedom = (of_rows + of_seeds) ** 2 / parts if parts > 0 else freedom
    stderr = math.sqrt(variance)
    return Estimate(value, stderr, _interval(value, stderr, freedom, confidence), _bootstrap(x, n, confidence))


def paired(one: ArrayLike, other: ArrayLike, counts: ArrayLike | None, confidence: float) -> Estimate:
    """The difference `one` - `other`, paired by seed and, with counts, by row.

    Args:
        one: [S] or, with counts, [S, R].
        other: the same; [1, R] for something that has no seed, such as the base model.
        counts: [R], or none for figures without rows.
        confidence: of the intervals.
    """
    difference = np.asarray(one, dtype=float) - np.asarray(other, dtype=float)
    if counts is None:
        return over_seeds(difference, confidence)
    return over_seeds_and_rows(difference, counts, confidence)


def _interval(value: float, stderr: float, freedom: float, confidence: float) -> tuple[float, float]:
    half = float(stats.t.ppf((1 + confidence) / 2, freedom)) * stderr
    return value - half, value + half


def _bootstrap(sums: np.ndarray, counts: np.ndarray, confidence: float) -> tuple[float, float]:
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    seeds, rows = sums.shape
    of_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES)
    of_rows = generator.multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES)
    values = ((of_seeds @ sums) * of_rows).sum(axis=1) / (seeds * (of_rows @ counts))
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
