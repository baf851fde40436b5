"""The verdict of a comparison: two sentences with numbers and their uncertainty."""

from __future__ import annotations

from collections.abc import Sequence

from tasks.analysis.measure import Measure, shared_confidence
from tasks.analysis.table import reading, signed
from tasks.stats.estimates import Estimate

FEW = 4
"""Differences that a sentence can hold."""


def verdict(found: Sequence[Measure], methods: Sequence[str], confidence: float) -> dict[str, str]:
    """Two sentences: about the held-out loss, or what comes nearest to it, and about all other held-out measures.

    These are the lm-eval scores and the second data set, or without both the scores of the report's answers; and the
    text that shows forgetting.

    Its tone is good where a method is better in the first and in nothing else worse, and bad where some are worse and
    none is better.

    Args:
        found: the measures; those that a method has no value of are left to the table.
        methods: the first is the reference.
        confidence: of the intervals.
    """
    reference, *others = methods
    if not others:
        return {"tone": "", "text": f"Only {reference} was trained, so there is nothing to compare."}
    whole = [one for one in found if set(methods) <= one.values.keys() and not one.exponential]
    held_out = [measure for measure in whole if measure.group in ("loss", "test") and measure.counts is not None]
    if not held_out:
        return {"tone": "", "text": "Nothing was held out, so nothing can be said of which method is better."}
    main, *rest = held_out
    rest += [measure for measure in whole if measure.group == "second"]
    rest = rest or [measure for measure in whole if measure.group == "answers"]
    rest += [measure for measure in whole if measure.group == "forgetting"]
    shared = shared_confidence(confidence, len(others))  # several chances to find something
    differences = {method: main.difference(method, reference, shared) for method in others}
    sentence = f"{main.name[0].upper()}{main.name[1:]}: " + "; ".join(
        f"{method} {main.estimate(method, confidence).value:.4f} against {reference}'s "
        f"{main.estimate(reference, confidence).value:.4f} ({_said(differences[method], shared)}: "
        f"{reading(differences[method], main.better)})"
        for method in others
    )
    second = _elsewhere(rest, others, reference, shared) or "Nothing else was held out"
    readings = {method: reading(difference, main.better) for method, difference in differences.items()}
    better = [method for method in others if readings[method] == "better"]
    unspoilt = [
        method
        for method in better
        if all(reading(one.difference(method, reference, shared), one.better) != "worse" for one in rest)
    ]
    tone = "better" if unspoilt else "worse" if "worse" in readings.values() and not better else ""
    return {"tone": tone, "text": f"{sentence}. {second[0].upper()}{second[1:]}."}


def _elsewhere(rest: Sequence[Measure], others: Sequence[str], reference: str, confidence: float) -> str:
    """What the other measures say: all differences where they are few, else only those beyond their error."""
    said, silent, beyond = [], 0, 0
    tested = len(rest) * len(others)
    for measure in rest:
        of_measure = []
        for method in others:
            difference = measure.difference(method, reference, confidence)
            word = reading(difference, measure.better)
            exceeds = word in ("better", "worse", "different")
            beyond += exceeds
            unknown = difference.repeated and not difference.stderr and difference.value != 0
            if exceeds or unknown or tested <= FEW:
                of_measure.append(f"{method} {_said(difference, confidence)} ({word})")
            else:
                silent += 1
        if of_measure:
            said.append(f"{measure.name}: {', '.join(of_measure)}")
    if silent:
        many = f"{silent} other differences in held-out measures" if said else f"all {silent} differences elsewhere"
        said.append(f"{many} {'lie within their error' if difference.repeated else 'are of one seed'}")
    if beyond and tested > 1:
        chance = tested * (1 - confidence)
        said.append(f"of {tested} tested at {confidence:.4g} each, {chance:.2g} would exceed their error by chance")
    return "; ".join(said)


def _said(estimate: Estimate, confidence: float) -> str:
    if estimate.interval is None:
        return f"{estimate.value:+.4f}"
    (low, high), resampled = estimate.interval, estimate.bootstrap
    said = f"{signed(estimate, 4)}, {confidence:.4g} interval {low:+.4f} to {high:+.4f}"
    if resampled and not low <= 0 <= high and resampled[0] <= 0 <= resampled[1]:  # then it decides
        said += f", but the bootstrap's {resampled[0]:+.4f} to {resampled[1]:+.4f}"
    return said
