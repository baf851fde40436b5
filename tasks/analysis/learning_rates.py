"""The learning rates that a comparison has tried: which one each method took, and whether the grid was wide enough."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tasks.analysis.compared_runs import RateTrial


def chosen_rate(trials: Sequence[RateTrial], method: str) -> float:
    """The rate of a method's lowest validation loss.

    Args:
        trials: of all methods.
        method: which has some.
    """
    return min((trial for trial in trials if trial.method == method), key=lambda trial: trial.loss).learning_rate


def trial_rows(trials: Sequence[RateTrial], methods: Sequence[str]) -> list[dict[str, Any]]:
    """What the report says of each trial.

    Args:
        trials: of all methods.
        methods: that have been compared.

    Returns:
        The trial, whether its rate was `chosen`, and the `edge` of the grid that a chosen one lies at, if any.
    """
    chosen = {method: chosen_rate(trials, method) for method in methods if trials}
    rows = []
    for trial in trials:
        rates = [other.learning_rate for other in trials if other.method == trial.method]
        taken = chosen.get(trial.method) == trial.learning_rate
        at = {max(rates): "highest", min(rates): "lowest"}.get(trial.learning_rate) if len(rates) > 1 else None
        row = trial.model_dump(include={"method", "learning_rate", "failure"})
        row |= {"loss": trial.loss if trial.history else None, "chosen": taken, "edge": at if taken else None}
        rows.append(row)
    return rows


def edge_sentence(rows: Sequence[dict[str, Any]]) -> str | None:
    """What a choice at the edge of the grid leaves open; none where no method has made one.

    Args:
        rows: of `trial_rows`.
    """
    at: dict[str, list[str]] = {}
    for row in rows:
        if row["edge"]:
            at.setdefault(f"the {row['edge']} rate tried, {row['learning_rate']}", []).append(row["method"])
    clauses = [f"{', '.join(methods)} took {edge}" for edge, methods in at.items()]
    return f"{'; '.join(clauses)}: a better one may lie beyond the grid." if clauses else None
