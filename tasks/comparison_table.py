"""The table of a comparison and its verdict: estimates turned into what a reader sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tasks.compared_runs import FaultRun
from tasks.comparison import Measure, Runs
from tasks.comparison_measures import final_training_loss, steps_of
from tasks.statistics import Estimate
from tasks.study import PUBLISHED

GROUPS = {
    "loss": "Loss",
    "test": "Test",
    "answers": "Answers",
    "forgetting": "Forgetting",
    "second": "Second data set",
    "cost": "Cost",
}


FEW = 4
"""Differences that a sentence can hold."""


def table(found: Sequence[Measure], methods: Sequence[str], confidence: float) -> list[dict[str, Any]]:
    """A row for each measure, with a cell for each method.

    Args:
        found: the measures.
        methods: in the order of the columns; the first is the reference.
        confidence: of the intervals.
    """
    return [_row(measure, methods, confidence) for measure in found]


def verdict(found: Sequence[Measure], methods: Sequence[str], confidence: float) -> dict[str, str]:
    """Two sentences: about the held-out loss, or what comes nearest to it, and about all other held-out measures.

    Args:
        found: the measures.
        methods: the first is the reference.
        confidence: of the intervals.
    """
    reference, *others = methods
    if not others:
        return {"tone": "", "text": f"Only {reference} was trained, so there is nothing to compare."}
    held_out = [measure for measure in found if measure.group in ("loss", "test") and measure.counts is not None]
    if not held_out:
        return {"tone": "", "text": "Nothing was held out, so nothing can be said of which method is better."}
    main, *rest = held_out
    rest += [measure for measure in found if measure.group == "second"]
    shared = 1 - (1 - confidence) / len(others)  # several chances to find something: the allowed error is shared
    differences = {method: main.difference(method, reference, shared) for method in others}
    sentence = f"{main.name[0].upper()}{main.name[1:]}: " + "; ".join(
        f"{method} {main.estimate(method, confidence).value:.4f} against {reference}'s "
        f"{main.estimate(reference, confidence).value:.4f} ({_said(differences[method], shared)}: "
        f"{_reading(differences[method], main.better)})"
        for method in others
    )
    readings = [_reading(difference, main.better) for difference in differences.values()]
    second = _elsewhere(rest, others, reference, shared) or "Nothing else was held out"
    elsewhere = [_reading(measure.difference(m, reference, shared), measure.better) for measure in rest for m in others]
    tone = "worse" if "worse" in readings else "better" if "better" in readings and "worse" not in elsewhere else ""
    return {"tone": tone, "text": f"{sentence}. {second[0].upper()}{second[1:]}."}


def _elsewhere(rest: Sequence[Measure], others: Sequence[str], reference: str, confidence: float) -> str:
    """What the other measures say: all differences where they are few, else only those beyond their error."""
    said, silent = [], 0
    for measure in rest:
        for method in others:
            difference = measure.difference(method, reference, confidence)
            reading = _reading(difference, measure.better)
            if reading in ("better", "worse") or len(rest) * len(others) <= FEW:
                said.append(f"{measure.name}: {method} {_said(difference, confidence)} ({reading})")
            else:
                silent += 1
    if silent:
        many = f"{silent} other differences in held-out measures" if said else f"all {silent} differences elsewhere"
        said.append(f"{many} lie within their error")
    return "; ".join(said)


def published_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The study's figures, each with the row of ours that comes nearest.

    Args:
        rows: of our table.
    """
    found = []
    for published in PUBLISHED:
        ours = next((row for row in rows if published.ours and row["name"].startswith(published.ours)), None)
        cells = {method: cell["text"] for method, cell in ours["cells"].items()} if ours else {}
        found.append(published._asdict() | {"ours": ours["name"] if ours else None, "cells": cells})
    return found


def fault_summary(faults: Sequence[FaultRun], runs: Runs) -> dict[str, Any] | None:
    """What the reproduced faults make of the same kind of run; none where they were not asked for.

    Args:
        faults: by seed.
        runs: by method, of the same seeds; the first method is what the fault is set against.
    """
    if not faults:
        return None
    first = next(iter(runs))
    fault, plain = faults[0].history, runs[first][0].history
    faulty = [line | {"loss": line["faulty_loss"]} for line in _weighted_alike(steps_of(fault))]
    values = {
        "reference": first,
        "seed": faults[0].seed,
        "faulty_loss": final_training_loss(faulty),
        "honest_loss": final_training_loss(steps_of(fault)),
        "reference_loss": final_training_loss(steps_of(plain)),
        "seconds": fault.facts["median_seconds_per_step"],
        "reference_seconds": plain.facts["median_seconds_per_step"],
    }
    return values | {
        "claimed": values["reference_loss"] / values["faulty_loss"],
        "true": values["reference_loss"] / values["honest_loss"],
        "slower": values["seconds"] / values["reference_seconds"],
        "others": {
            method: each[0].history.facts["median_seconds_per_step"] / values["reference_seconds"]
            for method, each in runs.items()
            if method != first
        },
    }


def _weighted_alike(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each step has the same number of positions, padding included."""
    return [step | {"supervised_tokens": 1} for step in steps]


def _row(measure: Measure, methods: Sequence[str], confidence: float) -> dict[str, Any]:
    best = measure.best(confidence)
    reference, *others = methods
    shared = 1 - (1 - confidence) / max(1, len(others))
    cells: dict[str, Any] = {}
    for method in methods:
        if method not in measure.values:
            cells[method] = {"text": measure.notes.get(method, "—"), "note": None, "best": False}
            continue
        own = measure.estimate(method, confidence)
        notes = [measure.notes[method]] if method in measure.notes else []
        cell: dict[str, Any] = {
            "text": _number(own, measure.digits),
            "values": measure.values[method].tolist() if measure.counts is None else None,
            "estimate": own.__dict__,
            "best": method == best,
        }
        if method != reference and reference in measure.values:
            difference = measure.difference(method, reference, shared)
            cell["to_reference"] = difference.__dict__ | {"reading": _reading(difference, measure.better)}
            notes.append(
                f"{_signed(difference, measure.digits)} to {reference}{_intervals(difference, measure.digits)}"
            )
        if (to_base := measure.to_base(method, confidence)) is not None:
            cell["to_base"] = to_base.__dict__ | {"reading": _reading(to_base, measure.better)}
            notes.append(f"{_signed(to_base, measure.digits)} to base")
        cells[method] = cell | {"note": "; ".join(notes) or None}
    of_base = None
    if measure.base is not None:
        total = len(measure.base) if measure.counts is None else measure.counts.sum()
        of_base = f"{measure.base.sum() / total:.{measure.digits}f}"
    return {
        "name": measure.name,
        "group": GROUPS[measure.group],
        "better": measure.better,
        "paired_by": "seed and row" if measure.counts is not None else "seed",
        "base": of_base,
        "cells": cells,
    }


def _number(estimate: Estimate, digits: int) -> str:
    error = "" if not estimate.stderr else f" ± {estimate.stderr:,.{digits}f}"
    return f"{estimate.value:,.{digits}f}{error}"


def _signed(estimate: Estimate, digits: int) -> str:
    error = "" if estimate.stderr is None else f" ± {estimate.stderr:,.{digits}f}"
    return f"{estimate.value:+,.{digits}f}{error}"


def _intervals(estimate: Estimate, digits: int) -> str:
    if estimate.interval is None or not estimate.stderr:
        return ""
    known = [("", estimate.interval), *([("bootstrap ", estimate.bootstrap)] if estimate.bootstrap else [])]
    said = [f"{name}{low:+,.{digits}f} to {high:+,.{digits}f}" for name, (low, high) in known]
    return f" ({', '.join(said)})"


def _said(estimate: Estimate, confidence: float) -> str:
    if estimate.interval is None:
        return f"{estimate.value:+.4f}"
    low, high = estimate.interval
    return f"{_signed(estimate, 4)}, {confidence:.4g} interval {low:+.4f} to {high:+.4f}"


def _reading(estimate: Estimate, better: str | None) -> str:
    if not estimate.repeated:
        return "one seed, which says nothing of others"
    if not estimate.stderr:
        return "equal for all seeds, error unknown"
    if not estimate.exceeds_error:
        return "within error"
    if better is None:
        return "different"
    return "better" if (estimate.value < 0) == (better == "lower") else "worse"
