"""The verdict of a comparison: two sentences with numbers and their uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tasks.analysis.labels import READINGS, Reading, label, sentence
from tasks.analysis.metric import Metric, shared_confidence
from tasks.analysis.table import reading, signed
from tasks.stats.estimates import Estimate

FEW = 4
"""Differences that a sentence can hold."""
BEYOND_ERROR: frozenset[Reading] = frozenset({"better", "worse", "different"})


@dataclass(frozen=True)
class _Difference:
    """How a method differs from the reference in one metric."""

    method: str
    estimate: Estimate
    reading: Reading
    confidence: float

    def __str__(self) -> str:
        """The difference with its interval; and the bootstrap's, where that decides."""
        estimate = self.estimate
        if estimate.interval is None:
            return f"{estimate.value:+.4f}"
        (low, high), resampled = estimate.interval, estimate.bootstrap
        text = f"{signed(estimate, 4)}, {self.confidence:.4g} interval {low:+.4f} to {high:+.4f}"
        if resampled and not low <= 0 <= high and resampled[0] <= 0 <= resampled[1]:
            text += f", but the bootstrap's {resampled[0]:+.4f} to {resampled[1]:+.4f}"
        return text


def verdict(metrics: Sequence[Metric], methods: Sequence[str], confidence: float) -> dict[str, str]:
    """Two sentences: about the held-out loss, or what comes nearest to it, and about all other held-out metrics.

    These are the lm-eval scores and the second data set, or without both the scores of the report's answers; and the
    text that shows forgetting.

    Args:
        metrics: those that a method has no value of are left to the table.
        methods: the first is the reference.
        confidence: of the intervals.
    """
    reference, *others = methods
    if not others:
        return {"tone": "", "text": f"Only {reference} was trained, so there is nothing to compare."}
    main, elsewhere = _held_out([metric for metric in metrics if set(methods) <= metric.values.keys()])
    if main is None:
        return {"tone": "", "text": "Nothing was held out, so nothing can be said of which method is better."}
    shared = shared_confidence(confidence, len(others))  # several chances to find something
    of_main = _differences(main, others, reference, shared)
    of_elsewhere = [(metric, _differences(metric, others, reference, shared)) for metric in elsewhere]
    first = f"{sentence(label(main))}: " + "; ".join(
        f"{difference.method} {main.estimate(difference.method, confidence).value:.4f} against {reference}'s "
        f"{main.estimate(reference, confidence).value:.4f} ({difference}: {READINGS[difference.reading]})"
        for difference in of_main
    )
    second = _elsewhere(of_elsewhere, shared) or "Nothing else was held out"
    tone = _tone(of_main, [difference for _, differences in of_elsewhere for difference in differences])
    return {"tone": tone, "text": f"{first}. {sentence(second)}."}


def _held_out(metrics: Sequence[Metric]) -> tuple[Metric | None, list[Metric]]:
    """The metric that decides, and those in which a method must not be worse."""
    metrics = [metric for metric in metrics if not metric.exponential]
    by_row = [metric for metric in metrics if metric.group in ("loss", "test") and metric.counts is not None]
    if not by_row:
        return None, []
    main, *rest = by_row
    rest += [metric for metric in metrics if metric.group == "second"]
    rest = rest or [metric for metric in metrics if metric.group == "answers"]
    return main, [*rest, *(metric for metric in metrics if metric.group == "forgetting")]


def _differences(metric: Metric, others: Sequence[str], reference: str, confidence: float) -> list[_Difference]:
    estimates = {method: metric.difference(method, reference, confidence) for method in others}
    return [
        _Difference(method, estimate, reading(estimate, metric.better), confidence)
        for method, estimate in estimates.items()
    ]


def _tone(of_main: Sequence[_Difference], elsewhere: Sequence[_Difference]) -> str:
    """Good where a method is better and in nothing else worse, bad where some are worse and none is better."""
    better = {difference.method for difference in of_main if difference.reading == "better"}
    spoilt = {difference.method for difference in elsewhere if difference.reading == "worse"}
    if better - spoilt:
        return "better"
    return "worse" if not better and any(difference.reading == "worse" for difference in of_main) else ""


def _elsewhere(differences: Sequence[tuple[Metric, Sequence[_Difference]]], confidence: float) -> str:
    """What the other metrics say: all differences where they are few, else only those beyond their error."""
    tested = [difference for _, of_metric in differences for difference in of_metric]
    clauses, silent = [], 0
    for metric, of_metric in differences:
        worded = [difference for difference in of_metric if len(tested) <= FEW or _stands_out(difference)]
        silent += len(of_metric) - len(worded)
        if worded:
            texts = (f"{difference.method} {difference} ({READINGS[difference.reading]})" for difference in worded)
            clauses.append(f"{label(metric)}: {', '.join(texts)}")
    if silent:
        many = f"{silent} other differences in held-out measures" if clauses else f"all {silent} differences elsewhere"
        clauses.append(f"{many} {'lie within their error' if tested[-1].estimate.repeated else 'are of one seed'}")
    if len(tested) > 1 and any(difference.reading in BEYOND_ERROR for difference in tested):
        chance = len(tested) * (1 - confidence)
        clauses.append(
            f"of {len(tested)} tested at {confidence:.4g} each, {chance:.2g} would exceed their error by chance"
        )
    return "; ".join(clauses)


def _stands_out(difference: _Difference) -> bool:
    """Whether a difference stands in the sentence however many there are."""
    estimate = difference.estimate
    unknown = estimate.repeated and not estimate.stderr and estimate.value != 0
    return difference.reading in BEYOND_ERROR or unknown
