"""The table of a comparison: estimates turned into what a reader sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tasks.analysis.labels import Reading, label
from tasks.analysis.metric import Metric, shared_confidence
from tasks.stats.estimates import Estimate
from tasks.stats.standard_errors import is_zero


def comparable(metrics: Sequence[Metric], *, same_machine: bool) -> list[Metric]:
    """The metrics; where runs come from several machines, none of their costs counts as better than another.

    Args:
        same_machine: whether all runs were trained on machines of one kind.
    """
    return [metric if same_machine or metric.group != "cost" else replace(metric, better=None) for metric in metrics]


def table(metrics: Sequence[Metric], methods: Sequence[str], confidence: float) -> list[dict[str, Any]]:
    """A row for each metric, with a cell for each method.

    Args:
        methods: in the order of the columns; the first is the reference.
        confidence: of the intervals.

    Returns:
        For each metric its `key`, its `name` in words, the key of its `group`, and the cells by method.
    """
    return [_row(metric, methods, confidence) for metric in metrics]


def _row(metric: Metric, methods: Sequence[str], confidence: float) -> dict[str, Any]:
    best, cells = metric.best(confidence), {}
    for method in methods:
        if method in metric.values:
            cells[method] = _cell(metric, method, methods, confidence) | {"best": method == best}
        else:
            cells[method] = {"text": metric.notes.get(method, "—"), "notes": [], "best": False}
    return {
        "key": metric.key,
        "name": label(metric),
        "group": metric.group,
        "better": metric.better,
        "paired_by": "seed and row" if metric.counts is not None else "seed",
        "base": _of_base(metric),
        "cells": cells,
    }


def _cell(metric: Metric, method: str, methods: Sequence[str], confidence: float) -> dict[str, Any]:
    """A method's mean, and its differences to the reference and to the base model."""
    reference, *others = methods
    own = metric.estimate(method, confidence)
    notes = [metric.notes[method]] if method in metric.notes else []
    cell: dict[str, Any] = {
        "text": number(own, metric.digits),
        "values": metric.values[method].tolist() if metric.counts is None else None,
        "estimate": own.__dict__,
    }
    if method != reference and reference in metric.values:
        difference = metric.difference(method, reference, shared_confidence(confidence, len(others)))
        cell["to_reference"] = _compared(metric, difference)
        notes += [f"{_change(metric, difference)} to {reference}", *_intervals(metric, difference)]
    if (to_base := metric.to_base(method, confidence)) is not None:
        cell["to_base"] = _compared(metric, to_base)
        notes.append(f"{_change(metric, to_base)} to base")
    return cell | {"notes": notes}


def _of_base(metric: Metric) -> str | None:
    """The base model's mean, if there is one."""
    if metric.base is None:
        return None
    total = len(metric.base) if metric.counts is None else metric.counts.sum()
    mean = Estimate(float(metric.base.sum() / total), None, None)
    return number(metric.shown(mean), metric.digits)


def _compared(metric: Metric, difference: Estimate) -> dict[str, Any]:
    return metric.shown(difference).__dict__ | {"reading": reading(difference, metric.better)}


def number(estimate: Estimate, digits: int) -> str:
    """A mean with its error.

    Args:
        digits: after the point.
    """
    error = "" if not estimate.stderr else f" ± {estimate.stderr:,.{digits}f}"
    return f"{estimate.value:,.{digits}f}{error}"


def signed(estimate: Estimate, digits: int) -> str:
    """A difference with its sign and its error.

    Args:
        digits: after the point.
    """
    error = "" if estimate.stderr is None else f" ± {estimate.stderr:,.{digits}f}"
    return f"{estimate.value:+,.{digits}f}{error}"


def _change(metric: Metric, difference: Estimate) -> str:
    if metric.exponential:
        return f"×{number(metric.shown(difference), metric.digits)}"
    return signed(difference, metric.digits)


def _intervals(metric: Metric, difference: Estimate) -> list[str]:
    if difference.stderr is None or is_zero(difference.stderr, difference.value):
        return []
    shown, form = metric.shown(difference), f"{'' if metric.exponential else '+'},.{metric.digits}f"
    intervals = [("t", shown.interval), ("bootstrap", shown.bootstrap)]
    return [f"{name} {ends[0]:{form}} to {ends[1]:{form}}" for name, ends in intervals if ends]


def reading(difference: Estimate, better: str | None) -> Reading:
    """What a difference says; in words by `READINGS`.

    Args:
        difference: to the reference.
        better: whether lower or higher is; none where neither is.
    """
    if not difference.repeated:
        return "one_seed"
    if not difference.stderr:
        return "unknown_error"
    if not difference.exceeds_error:
        return "within_error"
    if better is None:
        return "different"
    return "better" if (difference.value < 0) == (better == "lower") else "worse"
