"""Standard errors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ROUNDING = 1e-12
"""Of float64, some thousands of units in the last place."""


def ratio_stderr(sums: Sequence[float], counts: Sequence[float]) -> float | None:
    """Standard error of sum(sums) / sum(counts) over independent rows.

    Linearised ratio estimator (Cochran, Sampling Techniques, 3rd ed. 1977, section 6.3); with all counts 1 it is the
    standard error of the mean.

    Returns:
        None if there are fewer than two rows.
    """
    if len(sums) < 2:
        return None
    total, number = np.asarray(sums, dtype=float), np.asarray(counts, dtype=float)
    residuals = total - number * (total.sum() / number.sum())
    return float(np.sqrt(len(total) / (len(total) - 1) * (residuals**2).sum()) / number.sum())


def is_zero(stderr: float, value: float) -> bool:
    """Whether a standard error is 0 but for rounding: all values that it was taken from were equal.

    Args:
        stderr: of the value.
        value: their mean.
    """
    return stderr <= ROUNDING * abs(value)
