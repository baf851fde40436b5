"""Two models' scores on the same held-out data, with the error of their difference."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scipy import stats

from tasks.engine.artifacts import Artifact
from tasks.stats.standard_errors import is_zero, ratio_stderr

CONFIDENCE = 0.95
"""Of the interval by Student's t that a difference must leave out 0 with, or else lies within its error: of four rows
it has three standard errors to each side, of many two."""
FEW = 10
"""Where a difference is the same in every row or document, its measured error is 0. Of fewer than these nothing is made
of it: what all of ten do, three in ten others may not (the rule of three, Hanley and Lippman-Hand 1983)."""


def score_differences(base: Artifact, tuned: Artifact) -> list[dict[str, Any]]:
    """A row for each score that both have.

    Args:
        base: scores of the one that is compared with.
        tuned: scores of the other, on the same data.
    """
    before, after = (_json(scores.path / "scores.json") for scores in (base, tuned))
    rows = [validation_row(base, tuned)] if before["validation"] and after["validation"] else []
    return [*rows, *lm_eval_rows(before["lm_eval"], after["lm_eval"])]


def validation_row(base: Artifact, tuned: Artifact) -> dict[str, Any]:
    """Validation loss of both, with the standard error of their difference, paired by row.

    Args:
        base: scores of the base model.
        tuned: scores of the tuned model on the same rows.
    """
    before, after = (_json(scores.path / "scores.json")["validation"] for scores in (base, tuned))
    rows = [_json(scores.path / "rows.json")["validation"] for scores in (base, tuned)]
    differences = [new - old for old, new in zip(rows[0]["nll"], rows[1]["nll"], strict=True)]
    row = _compared(
        f"Validation loss, nats per token ({after['rows']} rows)",
        (before["loss"], before["stderr"]),
        (after["loss"], after["stderr"]),
        ratio_stderr(differences, rows[0]["supervised_tokens"]),
        after["rows"],
        higher_is_better=False,
    )
    return row | {"perplexity": {"base": before["perplexity"], "tuned": after["perplexity"]}}


def lm_eval_rows(base: dict[str, Any], tuned: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for each metric of each lm-eval task; the error of the difference takes both scores as independent.

    Args:
        base: metrics of the base model by task.
        tuned: metrics of the tuned model by task.
    """
    for task, metrics in base.items():
        for metric, before in metrics.items():
            after = tuned[task][metric]
            errors = before["stderr"], after["stderr"]
            error = None if None in errors else math.hypot(*errors)
            yield _compared(
                f"{task}: {metric}",
                (before["value"], before["stderr"]),
                (after["value"], after["stderr"]),
                error,
                before["n"],
                higher_is_better=before["higher_is_better"],
            )


def _compared(
    name: str,
    base: tuple[float | None, float | None],
    tuned: tuple[float | None, float | None],
    error: float | None,
    number: int,
    *,
    higher_is_better: bool | None,
) -> dict[str, Any]:
    difference = None if base[0] is None or tuned[0] is None else tuned[0] - base[0]
    if difference is None:
        reading = "not a number"
    elif error is None or number < 2 or (number < FEW and is_zero(error, difference) and difference):
        reading = "error unknown"
    elif abs(difference) <= stats.t.ppf(0.5 + CONFIDENCE / 2, number - 1) * error:
        reading = "within error"
    elif higher_is_better is None:
        reading = "different"  # the task does not say which way is better
    else:
        reading = "better" if (difference > 0) == higher_is_better else "worse"
    return {
        "name": name,
        "base": base[0],
        "base_stderr": base[1],
        "tuned": tuned[0],
        "tuned_stderr": tuned[1],
        "difference": difference,
        "stderr": error,
        "number": number,
        "higher_is_better": higher_is_better,
        "reading": reading,
    }


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
