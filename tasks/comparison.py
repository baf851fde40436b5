"""Measures by method, seed and held-out row, and how methods differ in them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from tasks.answers import read_answers
from tasks.artifacts import Artifact
from tasks.compared_runs import ComparedRun
from tasks.judge import outcomes
from tasks.quality import LOWER_IS_BETTER, MEASURES, matrix
from tasks.statistics import Estimate, over_seeds, over_seeds_and_rows, paired

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

    def estimate(self, method: str, confidence: float) -> Estimate:
        """The mean of a method."""
        values = self.values[method]
        if self.counts is None:
            return over_seeds(values, confidence)
        return over_seeds_and_rows(values, self.counts, confidence)

    def difference(self, one: str, other: str, confidence: float) -> Estimate:
        """`one` - `other`, paired."""
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
        shared = 1 - (1 - confidence) / len(others)
        return first if all(self.difference(first, other, shared).exceeds_error for other in others) else None


def wins(runs: Runs, confidence: float) -> list[dict[str, Any]]:
    """For each method but the first and each measure of answers: how often its answer is better than the first's.

    Args:
        runs: by method.
        confidence: of the interval of wins less losses.
    """
    reference, *others = runs
    rows = []
    for method in others:
        for name, meaning in MEASURES.items():
            one, other = (matrix([answer_measures(run.answers) for run in runs[m]], name) for m in (method, reference))
            if one is None or other is None:
                continue
            sign = np.sign(one - other) * (-1 if name in LOWER_IS_BETTER else 1)
            rows.append({"method": method, "measure": meaning, **_won(sign, confidence)})
        judged = [run.judgement for run in runs[method] if run.judgement]
        if judged:
            meaning = f"preferred by the judge {judged[0].facts['model']}, in both orders"
            rows.append({"method": method, "measure": meaning, **_won(np.array([*map(outcomes, judged)]), confidence)})
    return rows


def _won(sign: np.ndarray, confidence: float) -> dict[str, Any]:
    """Shares of wins, ties and losses, and wins less losses; signs are [S, R]."""
    shares = {"win": sign > 0, "tie": sign == 0, "loss": sign < 0}
    net = over_seeds_and_rows(sign.astype(float), np.ones(sign.shape[1]), confidence)
    return {name: float(each.mean()) for name, each in shares.items()} | {"net": net}


def answer_measures(answers: Artifact) -> list[dict[str, float]]:
    """The measures of each answer of the artifact `answers`."""
    return [line["measures"] for line in read_answers(answers)]
