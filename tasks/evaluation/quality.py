"""What an answer is worth beside its loss, by metrics that need no judge."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class AnswerMetric:
    """One way to measure an answer; its values lie between 0 and 1."""

    meaning: str
    better: Literal["lower", "higher"] = "higher"


ANSWER_METRICS = {
    "rouge_l": AnswerMetric("ROUGE-L with the expected answer (F1)"),
    "exact_match": AnswerMetric("exact match"),
    "json_valid": AnswerMetric("valid JSON, where JSON is expected"),
    "stopped": AnswerMetric("ended by itself within the limit"),
    "repetition": AnswerMetric("share of repeated 4-grams (lower is better)", better="lower"),
}
"""By the name that `measure_answer` gives them."""
GRAM = 4


def measure_answer(answer: str, expected: str, stopped: bool) -> dict[str, float]:
    """The metrics of one answer.

    ROUGE-L (Lin, 2004) compares lower-case words of Latin letters and digits, as the package rouge-score cuts them.

    Args:
        answer: the model's.
        expected: the data set's.
        stopped: whether the model ended its turn itself.

    Returns:
        By name; `json_valid` only where the expected answer is a JSON object or list.
    """
    metrics = {
        "rouge_l": float(_scorer().score(expected, answer)["rougeL"].fmeasure),
        "exact_match": float(answer.strip() == expected.strip()),
        "stopped": float(stopped),
        "repetition": repetition(answer.split()),
    }
    if is_json(expected):
        metrics["json_valid"] = float(is_json(answer))
    return metrics


def is_json(text: str) -> bool:
    """Whether a text is a JSON object or list and nothing else."""
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


def repetition(words: Sequence[str]) -> float:
    """One minus the share of distinct ones among the 4-grams; 0 where there is none."""
    grams = list(zip(*(words[start:] for start in range(GRAM)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def matrix(runs: Sequence[Sequence[dict[str, float]]], name: str) -> np.ndarray | None:
    """One metric by seed and prompt, [S, R]; none if no prompt has it.

    Args:
        runs: for each seed the metrics of each answer.
        name: of the metric.
    """
    columns = [index for index, metrics in enumerate(runs[0]) if name in metrics]
    return np.array([[run[index][name] for index in columns] for run in runs]) if columns else None


@functools.cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"])
