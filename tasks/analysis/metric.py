"""Measures by method, seed and held-out row, and how methods differ in them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from tasks.analysis.compared_runs import ComparedRun
from tasks.engine.artifacts import Artifact
from tasks.evaluation.answering import read_answers
from tasks.evaluation.judge import outcomes
from tasks.evaluation.quality import LOWER_IS_BETTER, MEASURES, matrix
from tasks.stats.estimates import Estimate, over_seeds, over_seeds_and_rows, paired

Runs = dict[str, list[ComparedRun]]
"""By method, in the order of the seeds."""


@dataclass
class Measure:
    """One row of the table, before it is reduced."""

    name: str
    better: Literal["lower", "higher"] | None
    """None where neither is."""
    values: dict[str, np.ndarray]
    """By method: [S], or by held-out row [S, R]."""
    digits: int = 4
    counts: np.ndarray | None = None
    """[R]: what each row's sum is divided by."""
    base: np.ndarray | None = None
    """The base model's, [1] or [1, R]."""
    notes: dict[str, str] = field(default_factory=dict)
    """By method: what a number cannot say."""
    group: str = ""
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

    def difference(self, one: str, other: str, confidence: float) -> Estimate:
        """`one` - `other`, paired; of logarithms where the values are such."""
        return paired(self.values[one], self.values[other], self.counts, confidence)

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


def wins(runs: Runs, confidence: float) -> list[dict[str, Any]]:
    """For each method but the first and each measure of answers: how often its answer is better than the first's.

    Args:
        runs: by method.
        confidence: of the intervals; shared among the methods.

    Returns:
        Method, measure, and the estimates `win`, `tie`, `loss` and `net`, wins less losses.
    """
    reference, *others = runs
    shared = shared_confidence(confidence, len(others))
    rows = []
    for method in others:
        for name, meaning in MEASURES.items():
            one, other = (matrix([answer_measures(run.answers) for run in runs[m]], name) for m in (method, reference))
            if one is None or other is None:
                continue
            sign = np.sign(one - other) * (-1 if name in LOWER_IS_BETTER else 1)
            rows.append({"method": method, "measure": meaning, **won(sign, shared)})
        judged = [run.judgement for run in runs[method] if run.judgement]
        if judged:
            meaning = f"preferred by the judge {judged[0].facts['model']}, in both orders"
            if len(judged) < len(runs[method]):
                meaning += f" ({len(judged)} of {len(runs[method])} seeds: then it failed)"
            rows.append({"method": method, "measure": meaning, **won(np.array([*map(outcomes, judged)]), shared)})
    return rows


def won(sign: np.ndarray, confidence: float) -> Mapping[str, Estimate]:
    """Shares of wins, ties and losses, and wins less losses.

    Args:
        sign: of each seed and row, [S, R]: 1 for a win, -1 for a loss, 0 for a tie.
        confidence: of the intervals.
    """
    shares = {"win": sign > 0, "tie": sign == 0, "loss": sign < 0, "net": sign}
    counts = np.ones(sign.shape[1])
    found = {name: over_seeds_and_rows(each.astype(float), counts, confidence) for name, each in shares.items()}
    return {name: _within(each, -1 if name == "net" else 0) for name, each in found.items()}


def _within(share: Estimate, lowest: int) -> Estimate:
    """An interval of a share ends where shares do."""
    if share.interval is None:
        return share
    low, high = share.interval
    return replace(share, interval=(max(low, lowest), min(high, 1.0)))


def answer_measures(answers: Artifact) -> list[dict[str, float]]:
    """The measures of each answer of the artifact `answers`."""
    return [line["measures"] for line in read_answers(answers)]
