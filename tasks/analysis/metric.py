"""Metrics by method, seed and held-out row, and how methods differ in them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Literal

import numpy as np

from tasks.analysis.compared_runs import ComparedRun
from tasks.stats.estimates import Estimate, over_seeds, over_seeds_and_rows, paired

Better = Literal["lower", "higher"]
Runs = dict[str, list[ComparedRun]]
"""By method, in the order of the seeds."""


@dataclass
class Metric:
    """One row of the table, before it is reduced. Its words are those of `tasks.analysis.labels`."""

    key: str
    """What it is, such as `validation_loss` or `lm_eval:TASK:METRIC`."""
    group: str
    """Key of the part of the table that it stands in, one of `GROUPS`."""
    better: Better | None
    """None where neither is."""
    values: dict[str, np.ndarray]
    """By method: [S], or by held-out row [S, R]."""
    _: KW_ONLY
    digits: int = 4
    counts: np.ndarray | None = None
    """[R]: what each row's sum is divided by."""
    base: np.ndarray | None = None
    """The base model's, [1] or [1, R]."""
    facts: Mapping[str, object] = field(default_factory=dict)
    """What its label names beside the number of rows."""
    notes: dict[str, str] = field(default_factory=dict)
    """By method: what a number cannot say."""
    exponential: bool = False
    """Values are logarithms: shown are the exponential of a mean, and of a difference, which is a ratio then."""

    def estimate(self, method: str, confidence: float) -> Estimate:
        """The mean of a method."""
        values = self.values[method]
        if self.counts is None:
            return self.shown(over_seeds(values, confidence))
        return self.shown(over_seeds_and_rows(values, self.counts, confidence))

    def shown(self, estimate: Estimate) -> Estimate:
        """A mean or a difference as the reader sees it."""
        return exponentiated(estimate) if self.exponential else estimate

    def difference(self, method: str, other: str, confidence: float) -> Estimate:
        """`method` - `other`, paired; of logarithms where the values are such."""
        return paired(self.values[method], self.values[other], self.counts, confidence)

    def to_base(self, method: str, confidence: float) -> Estimate | None:
        """The method - the base model, paired by row."""
        if self.base is None:
            return None
        return paired(self.values[method], self.base, self.counts, confidence)

    def best(self, confidence: float) -> str | None:
        """The method whose difference to every other one exceeds its error; the allowed error is shared among them.

        None where a method has no value, and so cannot be compared.
        """
        if self.better is None or len(self.values) < 2 or self.notes.keys() - self.values.keys():
            return None
        sign = 1 if self.better == "lower" else -1
        means = {method: sign * self.estimate(method, confidence).value for method in self.values}
        first = min(means, key=lambda method: means[method])
        others = [method for method in means if method != first]
        shared = shared_confidence(confidence, len(others))
        return first if all(self.difference(first, other, shared).exceeds_error for other in others) else None


def exponentiated(estimate: Estimate) -> Estimate:
    """The exponential of what is estimated: of its interval's ends too, and the error by the delta method."""
    value = _exp(estimate.value)

    def ends(interval: tuple[float, float] | None) -> tuple[float, float] | None:
        return None if interval is None else (_exp(interval[0]), _exp(interval[1]))

    stderr = None if estimate.stderr is None else value * estimate.stderr
    return replace(
        estimate, value=value, stderr=stderr, interval=ends(estimate.interval), bootstrap=ends(estimate.bootstrap)
    )


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))  # beyond, it is no number that JSON knows


def shared_confidence(confidence: float, others: int) -> float:
    """The confidence of each comparison with one reference, so that all together are right as often as stated.

    Args:
        confidence: of all together.
        others: methods that are compared with the reference.
    """
    return 1 - (1 - confidence) / max(1, others)
