"""The table of a comparison: estimates turned into what a reader sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tasks.analysis.measure import Measure, shared_confidence
from tasks.stats.estimates import Estimate
from tasks.stats.standard_errors import is_zero

GROUPS = {
    "loss": "Loss",
    "test": "Test",
    "answers": "Answers",
    "forgetting": "Forgetting",
    "second": "Second data set",
    "cost": "Cost",
}


def comparable(found: Sequence[Measure], *, same_machine: bool) -> list[Measure]:
    """The measures; where runs come from several machines, none of their costs counts as better than another.

    Args:
        found: the measures.
        same_machine: whether all runs were trained on machines of one kind.
    """
    return [one if same_machine or one.group != "cost" else replace(one, better=None) for one in found]


def table(found: Sequence[Measure], methods: Sequence[str], confidence: float) -> list[dict[str, Any]]:
    """A row for each measure, with a cell for each method.

    Args:
        found: the measures.
        methods: in the order of the columns; the first is the reference.
        confidence: of the intervals.
    """
    return [_row(measure, methods, confidence) for measure in found]


def _row(measure: Measure, methods: Sequence[str], confidence: float) -> dict[str, Any]:
    best = measure.best(confidence)
    reference, *others = methods
    shared = shared_confidence(confidence, len(others))
    cells: dict[str, Any] = {}
    for method in methods:
        if method not in measure.values:
            cells[method] = {"text": measure.notes.get(method, "—"), "notes": [], "best": False}
            continue
        own = measure.estimate(method, confidence)
        notes = [measure.notes[method]] if method in measure.notes else []
        cell: dict[str, Any] = {
            "text": number(own, measure.digits),
            "values": measure.values[method].tolist() if measure.counts is None else None,
            "estimate": own.__dict__,
            "best": method == best,
        }
        if method != reference and reference in measure.values:
            difference = measure.difference(method, reference, shared)
            cell["to_reference"] = _compared(measure, difference)
            notes += [f"{_change(measure, difference)} to {reference}", *_intervals(measure, difference)]
        if (to_base := measure.to_base(method, confidence)) is not None:
            cell["to_base"] = _compared(measure, to_base)
            notes.append(f"{_change(measure, to_base)} to base")
        cells[method] = cell | {"notes": notes}
    of_base = None
    if measure.base is not None:
        total = len(measure.base) if measure.counts is None else measure.counts.sum()
        mean = Estimate(float(measure.base.sum() / total), None, None)
        of_base = number(measure.shown(mean), measure.digits)
    return {
        "name": measure.name,
        "group": GROUPS[measure.group],
        "better": measure.better,
        "paired_by": "seed and row" if measure.counts is not None else "seed",
        "base": of_base,
        "cells": cells,
    }


def _compared(measure: Measure, difference: Estimate) -> dict[str, Any]:
    return measure.shown(difference).__dict__ | {"reading": reading(difference, measure.better)}


def number(estimate: Estimate, digits: int) -> str:
    """A mean with its error.

    Args:
        estimate: what.
        digits: after the point.
    """
    error = "" if not estimate.stderr else f" ± {estimate.stderr:,.{digits}f}"
    return f"{estimate.value:,.{digits}f}{error}"


def signed(estimate: Estimate, digits: int) -> str:
    """A difference with its sign and its error.

    Args:
        estimate: what.
        digits: after the point.
    """
    error = "" if estimate.stderr is None else f" ± {estimate.stderr:,.{digits}f}"
    return f"{estimate.value:+,.{digits}f}{error}"


def _change(measure: Measure, difference: Estimate) -> str:
    if measure.exponential:
        return f"×{number(measure.shown(difference), measure.digits)}"
    return signed(difference, measure.digits)


def _intervals(measure: Measure, difference: Estimate) -> list[str]:
    if difference.stderr is None or is_zero(difference.stderr, difference.value):
        return []
    shown, form = measure.shown(difference), f"{'' if measure.exponential else '+'},.{measure.digits}f"
    known = [("t", shown.interval), ("bootstrap", shown.bootstrap)]
    return [f"{name} {ends[0]:{form}} to {ends[1]:{form}}" for name, ends in known if ends]


def reading(difference: Estimate, better: str | None) -> str:
    """What a difference says, in a word or a few.

    Args:
        difference: to the reference.
        better: whether lower or higher is; none where neither is.
    """
    if not difference.repeated:
        return "one seed, which says nothing of others"
    if not difference.stderr:
        return "equal for all seeds, error unknown"
    if not difference.exceeds_error:
        return "within error"
    if better is None:
        return "different"
    return "better" if (difference.value < 0) == (better == "lower") else "worse"
