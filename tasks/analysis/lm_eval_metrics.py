"""The scores of lm-eval's tasks in a comparison, as far as they are numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tasks.analysis.measure import Measure, Runs
from tasks.engine.artifacts import Artifact


def lm_eval_measures(runs: Runs, base: Artifact) -> list[Measure]:
    """A measure for each metric of each task.

    A metric whose values of single documents are known everywhere is paired by them. A method one of whose values is
    missing or no number has a note in place of them.

    Args:
        runs: by method.
        base: the base model's scores.
    """
    of_base, documents_of_base = _read(base)
    scores = {method: [_read(run.scores) for run in each] for method, each in runs.items()}
    found = []
    for task, metrics in of_base.items():
        for metric, before in metrics.items():
            values = {m: [_value(made, task, metric) for made, _ in each] for m, each in scores.items()}
            notes = {
                method: "not a number with seed " + ", ".join(str(run.seed) for run in _without(runs[method], each))
                for method, each in values.items()
                if None in each
            }
            known = [method for method in runs if method not in notes]
            documents = {m: [_documents(rows, task, metric) for _, rows in scores[m]] for m in known}
            first = _documents(documents_of_base, task, metric)
            better: Any = {None: None, True: "higher", False: "lower"}[before["higher_is_better"]]
            lengths = {None if one is None else len(one) for each in (*documents.values(), [first]) for one in each}
            measure = Measure(
                f"{task}: {metric} ({before['n']} documents)",
                better,
                {method: np.array(values[method], dtype=float) for method in known},
                notes=notes,
                base=None if before["value"] is None else np.array([before["value"]]),
                group="test",
            )
            if len(lengths) == 1 and None not in lengths:
                measure.values = {method: np.array(each) for method, each in documents.items()}
                measure.base, measure.counts = np.array([first]), np.ones(lengths.pop() or 0)
            found.append(measure)
    return found


def _read(scores: Artifact) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics by task, and the values of the documents."""
    whole, rows = (json.loads((scores.path / name).read_text("utf-8")) for name in ("scores.json", "rows.json"))
    return whole["lm_eval"], rows["lm_eval"]


def _value(scores: dict[str, Any], task: str, metric: str) -> float | None:
    value: float | None = scores.get(task, {}).get(metric, {}).get("value")
    return value


def _documents(rows: dict[str, Any], task: str, metric: str) -> list[float] | None:
    values: list[float] | None = rows.get(task, {}).get(metric)
    return values if values and all(map(math.isfinite, values)) else None


def _without(runs: Sequence[Any], values: Sequence[float | None]) -> list[Any]:
    return [run for run, value in zip(runs, values, strict=True) if value is None]
