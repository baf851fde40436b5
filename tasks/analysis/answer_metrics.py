"""The quality of answers in a comparison, and whose answer to the same prompt is better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tasks.analysis.compared_runs import ComparedRun
from tasks.analysis.metric import Metric, Runs, shared_confidence
from tasks.engine.artifacts import Artifact
from tasks.evaluation.answering import read_answers
from tasks.evaluation.judge import outcomes
from tasks.evaluation.quality import ANSWER_METRICS, matrix
from tasks.stats.estimates import Estimate, over_seeds_and_rows


def answer_metrics(runs: Runs, base: Artifact) -> list[Metric]:
    """A metric for each way to measure an answer that fits these prompts.

    Args:
        runs: by method.
        base: the base model's answers.
    """
    of_base = [_by_prompt(base)]
    if not of_base[0]:
        return []
    metrics = []
    for name, kind in ANSWER_METRICS.items():
        base_values = matrix(of_base, name)
        if base_values is None:
            continue
        values = {method: _values(of_method, name) for method, of_method in runs.items()}
        metrics.append(
            Metric(
                f"answers:{name}",
                "answers",
                kind.better,
                {method: of_method for method, of_method in values.items() if of_method is not None},
                counts=np.ones(base_values.shape[1]),
                base=base_values,
                facts={"meaning": kind.meaning},
            )
        )
    return metrics


def wins(runs: Runs, confidence: float) -> list[dict[str, Any]]:
    """For each method but the first and each metric of answers: how often its answer is better than the first's.

    Args:
        runs: by method.
        confidence: of the intervals; shared among the methods.

    Returns:
        Method, key and words of the metric, and the estimates `win`, `tie`, `loss` and `net`, wins less losses. The
        judge's key is `judge`.
    """
    reference, *others = runs
    shared = shared_confidence(confidence, len(others))
    rows = []
    for method in others:
        for name, kind in ANSWER_METRICS.items():
            own, first = _values(runs[method], name), _values(runs[reference], name)
            if own is None or first is None:
                continue
            sign = np.sign(own - first) * (-1 if kind.better == "lower" else 1)
            row = {"method": method, "key": f"answers:{name}", "measure": kind.meaning}
            rows.append({**row, **win_shares(sign, shared)})
        rows += _judge_wins(method, runs[method], shared)
    return rows


def _judge_wins(method: str, runs: Sequence[ComparedRun], confidence: float) -> list[dict[str, Any]]:
    """What a judge preferred, if one was asked."""
    judgements = [run.judgement for run in runs if run.judgement]
    if not judgements:
        return []
    meaning = f"preferred by the judge {judgements[0].facts['model']}, in both orders"
    if len(judgements) < len(runs):
        meaning += f" ({len(judgements)} of {len(runs)} seeds: then it failed)"
    sign = np.array([*map(outcomes, judgements)])
    return [{"method": method, "key": "judge", "measure": meaning, **win_shares(sign, confidence)}]


def win_shares(sign: np.ndarray, confidence: float) -> Mapping[str, Estimate]:
    """Shares of wins, ties and losses, and wins less losses.

    Args:
        sign: of each seed and row, [S, R]: 1 for a win, -1 for a loss, 0 for a tie.
        confidence: of the intervals.
    """
    outcome_of_rows = {"win": sign > 0, "tie": sign == 0, "loss": sign < 0, "net": sign}
    counts = np.ones(sign.shape[1])
    shares = {
        name: over_seeds_and_rows(values.astype(float), counts, confidence) for name, values in outcome_of_rows.items()
    }
    return {name: _within(share, -1 if name == "net" else 0) for name, share in shares.items()}


def _within(share: Estimate, lowest: int) -> Estimate:
    """An interval of a share ends where shares do."""
    if share.interval is None:
        return share
    low, high = share.interval
    return replace(share, interval=(max(low, lowest), min(high, 1.0)))


def _values(runs: Sequence[ComparedRun], name: str) -> np.ndarray | None:
    """One metric by seed and prompt, [S, R]; none if no prompt has it."""
    return matrix([_by_prompt(run.answers) for run in runs], name)


def _by_prompt(answers: Artifact) -> list[dict[str, float]]:
    return [line["metrics"] for line in read_answers(answers)]
