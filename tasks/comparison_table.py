"""The table of a comparison and its verdict: estimates turned into what a reader sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tasks.compared_runs import ComparedRun, FaultRun
from tasks.comparison import Measure
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
    second = "; ".join(
        f"{measure.name}: {method} {_said(measure.difference(method, reference, shared), shared)} "
        f"({_reading(measure.difference(method, reference, shared), measure.better)})"
        for measure in rest
        for method in others
    )
    second = second or "Nothing else was held out"
    tone = "better" if "better" in readings and "worse" not in readings else "worse" if "worse" in readings else ""
    return {"tone": tone, "text": f"{sentence}. {second[0].upper()}{second[1:]}."}


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


def fault_summary(faults: Sequence[FaultRun], reference: Sequence[ComparedRun]) -> dict[str, Any] | None:
    """What the reproduced faults make of the same kind of run; none where they were not asked for.

    Args:
        faults: by seed.
        reference: of the same seeds.
    """
    if not faults:
        return None
    fault, plain = faults[0].history, reference[0].history
    faulty = [line | {"loss": line["faulty_loss"]} for line in _weighted_alike(steps_of(fault))]
    values = {
        "reference": reference[0].method,
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
    }


def _weighted_alike(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each step has the same number of positions, padding included."""
    return [step | {"supervised_tokens": 1} for step in steps]


def _row(measure: Measure, methods: Sequence[str], confidence: float) -> dict[str, Any]:
    best = measure.best(confidence)
    reference = methods[0]
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
            difference = measure.difference(method, reference, confidence)
            cell["to_reference"] = difference.__dict__ | {"reading": _reading(difference, measure.better)}
            notes.append(f"{_signed(difference, measure.digits)} to {reference}")
        if (to_base := measure.to_base(method, confidence)) is not None:
            cell["to_base"] = to_base.__dict__ | {"reading": _reading(to_base, measure.better)}
            notes.append(f"{_signed(to_base, measure.digits)} to base")
        cells[method] = cell | {"note": "; ".join(notes) or None}
    of_base = None
    if measure.base is not None and measure.counts is not None:
        of_base = f"{measure.base.sum() / measure.counts.sum():.{measure.digits}f}"
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


def _said(estimate: Estimate, confidence: float) -> str:
    if estimate.interval is None:
        return f"{estimate.value:+.4f}"
    low, high = estimate.interval
    return f"{_signed(estimate, 4)}, {confidence:.4g} interval {low:+.4f} to {high:+.4f}"


def _reading(estimate: Estimate, better: str | None) -> str:
    if estimate.interval is None:
        return "error unknown"
    if not estimate.exceeds_error:
        return "within error"
    if better is None:
        return "different"
    return "better" if (estimate.value < 0) == (better == "lower") else "worse"
