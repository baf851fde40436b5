"""The study that this project starts from beside a comparison: its published figures, and its faults reproduced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tasks.analysis.compared_runs import FaultRun
from tasks.analysis.metric import Runs
from tasks.analysis.published_study import PUBLISHED, Published
from tasks.analysis.table import number
from tasks.stats.estimates import Estimate
from tasks.training.history import final_training_loss, steps_of


def published_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The study's figures, each with the row of ours that comes nearest.

    Args:
        rows: of our table.

    Returns:
        What is published, with `ours`, the row's name, and `cells`, what each method has there in the study's unit.
    """
    of_ours = {row["key"]: row for row in rows}
    compared = []
    for published in PUBLISHED:
        ours = of_ours.get(published.ours)
        cells = {method: _converted(cell, published) for method, cell in ours["cells"].items()} if ours else {}
        name = f"{ours['name']}{f', in {published.unit}' if published.unit else ''}" if ours else None
        compared.append(asdict(published) | {"ours": name, "cells": cells})
    return compared


def _converted(cell: dict[str, Any], published: Published) -> str:
    """A cell's text in the study's unit."""
    if not published.unit or "estimate" not in cell:
        return str(cell["text"])
    value, stderr = cell["estimate"]["value"], cell["estimate"]["stderr"]
    ours = Estimate(value / published.per, stderr and stderr / published.per, None)
    return f"{number(ours, 2)} {published.unit}"


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
            method: of_method[0].history.facts["median_seconds_per_step"] / values["reference_seconds"]
            for method, of_method in runs.items()
            if method != first
        },
    }


def _weighted_alike(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each step has the same number of positions, padding included."""
    return [step | {"supervised_tokens": 1} for step in steps]
