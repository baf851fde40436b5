"""The scores of lm-eval's tasks in a comparison, as far as they are numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tasks.analysis.compared_runs import ComparedRun
from tasks.analysis.metric import Better, Metric, Runs
from tasks.engine.artifacts import Artifact
from tasks.stats.json_files import read_json
from tasks.stats.score_differences import lm_eval_key

BETTER: dict[bool | None, Better | None] = {None: None, True: "higher", False: "lower"}
"""By what lm-eval says of `higher_is_better`."""


def lm_eval_metrics(runs: Runs, base: Artifact) -> list[Metric]:
    """A metric for each metric of each task.

    A metric whose values of single documents are known everywhere is paired by them. A method one of whose values is
    missing or no number has a note in place of them.

    Args:
        runs: by method.
        base: the base model's scores.
    """
    of_base, documents_of_base = _read(base)
    scores = {method: [_read(run.scores) for run in of_method] for method, of_method in runs.items()}
    metrics = []
    for task, names in of_base.items():
        for name, base_score in names.items():
            metric = _metric(task, name, base_score, runs, scores)
            _pair_by_documents(metric, task, name, scores, documents_of_base)
            metrics.append(metric)
    return metrics


def _metric(
    task: str, name: str, base_score: dict[str, Any], runs: Runs, scores: Mapping[str, Sequence[tuple[Any, Any]]]
) -> Metric:
    """One value of each run, where it is a number."""
    values = {method: [_value(tasks, task, name) for tasks, _ in scores[method]] for method in runs}
    notes = {
        method: "not a number with seed " + ", ".join(str(run.seed) for run in _without(runs[method], of_method))
        for method, of_method in values.items()
        if None in of_method
    }
    return Metric(
        lm_eval_key(task, name),
        "test",
        BETTER[base_score["higher_is_better"]],
        {method: np.array(values[method], dtype=float) for method in runs if method not in notes},
        notes=notes,
        base=None if base_score["value"] is None else np.array([base_score["value"]]),
        facts={"task": task, "metric": name, "documents": base_score["n"]},
    )


def _pair_by_documents(
    metric: Metric,
    task: str,
    name: str,
    scores: Mapping[str, Sequence[tuple[Any, Any]]],
    documents_of_base: dict[str, Any],
) -> None:
    """Put the documents' values in place of their means, where all models have as many."""
    documents = {method: [_documents(rows, task, name) for _, rows in scores[method]] for method in metric.values}
    of_base = _documents(documents_of_base, task, name)
    lengths = {None if run is None else len(run) for runs in (*documents.values(), [of_base]) for run in runs}
    if len(lengths) == 1 and None not in lengths:
        metric.values = {method: np.array(of_method) for method, of_method in documents.items()}
        metric.base, metric.counts = np.array([of_base]), np.ones(lengths.pop() or 0)


def _read(scores: Artifact) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics by task, and the values of the documents."""
    whole, rows = (read_json(scores.path / name) for name in ("scores.json", "rows.json"))
    return whole["lm_eval"], rows["lm_eval"]


def _value(scores: dict[str, Any], task: str, metric: str) -> float | None:
    value: float | None = scores.get(task, {}).get(metric, {}).get("value")
    return value


def _documents(rows: dict[str, Any], task: str, metric: str) -> list[float] | None:
    values: list[float] | None = rows.get(task, {}).get(metric)
    return values if values and all(map(math.isfinite, values)) else None


def _without(runs: Sequence[ComparedRun], values: Sequence[float | None]) -> list[ComparedRun]:
    return [run for run, value in zip(runs, values, strict=True) if value is None]
