"""Two models' scores on the same held-out data, with the error of their difference."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from scipy import stats

from tasks.engine.artifacts import Artifact
from tasks.stats.json_files import read_json
from tasks.stats.standard_errors import is_zero, ratio_stderr

CONFIDENCE = 0.95
"""Of the interval by Student's t that a difference must leave out 0 with, or else lies within its error: of four rows
it has three standard errors to each side, of many two."""
FEW = 10
"""Where a difference is the same in every row or document, its measured error is 0. Of fewer than these nothing is made
of it: what all of ten do, three in ten others may not (the rule of three, Hanley and Lippman-Hand 1983)."""
VALIDATION_LOSS = "validation_loss"
"""The key of the validation loss; those of lm-eval's metrics are `lm_eval:TASK:METRIC`, see `lm_eval_key`."""

Reading = Literal["better", "worse", "different", "within_error", "unknown_error", "not_a_number"]
"""What a difference says."""


@dataclass(frozen=True)
class ScoreDifference:
    """One score of two models on the same held-out data."""

    key: str
    """What is scored: `validation_loss` or `lm_eval:TASK:METRIC`."""
    base: float | None
    """Score of the model that is compared with; None where it is not a number."""
    base_stderr: float | None
    tuned: float | None
    """Score of the other model."""
    tuned_stderr: float | None
    difference: float | None
    """`tuned` less `base`."""
    stderr: float | None
    """One standard error of the difference; None where it is not known."""
    number: int
    """Held-out rows or documents."""
    higher_is_better: bool | None
    """None where the task does not say."""
    reading: Reading
    perplexity: dict[str, float] | None = None
    """Of the validation loss: the perplexities of `base` and `tuned`."""

    @property
    def unit(self) -> str:
        """What the validation loss is counted in, and over how much."""
        return f"nats per token ({self.number} rows)"

    @property
    def label(self) -> str:
        """What is scored, in words."""
        if self.key == VALIDATION_LOSS:
            return f"Validation loss, {self.unit}"
        task, _, metric = self.key.partition(":")[2].rpartition(":")
        return f"{task}: {metric}"


def lm_eval_key(task: str, metric: str) -> str:
    """The key of an lm-eval metric."""
    return f"lm_eval:{task}:{metric}"


def score_differences(base: Artifact, tuned: Artifact) -> list[ScoreDifference]:
    """A row for each score that both have.

    Args:
        base: scores of the one that is compared with.
        tuned: scores of the other, on the same data.
    """
    before, after = (read_json(scores.path / "scores.json") for scores in (base, tuned))
    rows = [validation_row(base, tuned)] if before["validation"] and after["validation"] else []
    return [*rows, *lm_eval_rows(before["lm_eval"], after["lm_eval"])]


def validation_row(base: Artifact, tuned: Artifact) -> ScoreDifference:
    """Validation loss of both, with the standard error of their difference, paired by row.

    Args:
        base: scores of the base model.
        tuned: scores of the tuned model on the same rows.
    """
    before, after = (read_json(scores.path / "scores.json")["validation"] for scores in (base, tuned))
    rows = [read_json(scores.path / "rows.json")["validation"] for scores in (base, tuned)]
    differences = [new - old for old, new in zip(rows[0]["nll"], rows[1]["nll"], strict=True)]
    return _compared(
        VALIDATION_LOSS,
        base=(before["loss"], before["stderr"]),
        tuned=(after["loss"], after["stderr"]),
        stderr=ratio_stderr(differences, rows[0]["supervised_tokens"]),
        number=after["rows"],
        higher_is_better=False,
        perplexity={"base": before["perplexity"], "tuned": after["perplexity"]},
    )


def lm_eval_rows(base: dict[str, Any], tuned: dict[str, Any]) -> Iterator[ScoreDifference]:
    """A row for each metric of each lm-eval task; the error of the difference takes both scores as independent.

    Args:
        base: metrics of the base model by task.
        tuned: metrics of the tuned model by task.
    """
    for task, metrics in base.items():
        for metric, before in metrics.items():
            after = tuned[task][metric]
            stderrs = before["stderr"], after["stderr"]
            yield _compared(
                lm_eval_key(task, metric),
                base=(before["value"], before["stderr"]),
                tuned=(after["value"], after["stderr"]),
                stderr=None if None in stderrs else math.hypot(*stderrs),
                number=before["n"],
                higher_is_better=before["higher_is_better"],
            )


def _compared(
    key: str,
    *,
    base: tuple[float | None, float | None],
    tuned: tuple[float | None, float | None],
    stderr: float | None,
    number: int,
    higher_is_better: bool | None,
    perplexity: dict[str, float] | None = None,
) -> ScoreDifference:
    difference = None if base[0] is None or tuned[0] is None else tuned[0] - base[0]
    return ScoreDifference(
        key=key,
        base=base[0],
        base_stderr=base[1],
        tuned=tuned[0],
        tuned_stderr=tuned[1],
        difference=difference,
        stderr=stderr,
        number=number,
        higher_is_better=higher_is_better,
        reading=_reading(difference, stderr, number, higher_is_better),
        perplexity=perplexity,
    )


def _reading(difference: float | None, stderr: float | None, number: int, higher_is_better: bool | None) -> Reading:
    if difference is None:
        return "not_a_number"
    if stderr is None or number < 2 or (number < FEW and is_zero(stderr, difference) and difference):
        return "unknown_error"
    if abs(difference) <= stats.t.ppf(0.5 + CONFIDENCE / 2, number - 1) * stderr:
        return "within_error"
    if higher_is_better is None:
        return "different"
    return "better" if (difference > 0) == higher_is_better else "worse"
