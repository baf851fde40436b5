"""What an answer is worth beside its loss, by measures that need no judge."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

MEASURES = {
    "rouge_l": "ROUGE-L with the expected answer (F1)",
    "exact_match": "exact match",
    "json_valid": "valid JSON, where JSON is expected",
    "stopped": "ended by itself within the limit",
    "repetition": "share of repeated 4-grams (lower is better)",
}
"""Name and meaning of each measure; all lie between 0 and 1."""
LOWER_IS_BETTER = ("repetition",)
GRAM = 4


def measure(answer: str, expected: str, stopped: bool) -> dict[str, float]:
    """The measures of one answer.

    ROUGE-L (Lin, 2004) compares lower-case words of Latin letters and digits, as the package rouge-score cuts them.

    Args:
        answer: the model's.
        expected: the data set's.
        stopped: whether the model ended its turn itself.

    Returns:
        By name; `json_valid` only where the expected answer is a JSON object or list.
    """
    found = {
        "rouge_l": float(_scorer().score(expected, answer)["rougeL"].fmeasure),
        "exact_match": float(answer.strip() == expected.strip()),
        "stopped": float(stopped),
        "repetition": repetition(answer.split()),
    }
    if is_json(expected):
        found["json_valid"] = float(is_json(answer))
    return found


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
    """One measure by seed and prompt, [S, R]; none if no prompt has it.

    Args:
        runs: for each seed the measures of each answer.
        name: of the measure.
    """
    columns = [index for index, measures in enumerate(runs[0]) if name in measures]
    return np.array([[run[index][name] for index in columns] for run in runs]) if columns else None


@functools.cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"])
