"""A training's history, and what it says of the training's end, for the reports of a run and of a comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tasks.engine.artifacts import Artifact
from tasks.stats.json_files import read_json_lines

LAST = 10
"""Optimizer steps that are the end of a training, at most."""

Step = Mapping[str, Any]


def steps_of(history: Artifact) -> list[dict[str, Any]]:
    """The lines of a training's history."""
    steps: list[dict[str, Any]] = read_json_lines(history.path / "history.jsonl")
    return steps


def steps_to_kept(history: Artifact) -> list[dict[str, Any]]:
    """The lines of a training's history up to the step whose adapter was kept."""
    steps, kept = steps_of(history), history.facts["kept"]
    return steps[: kept[0]] if kept else steps


def kept_loss(history: Artifact) -> float:
    """The validation loss, measured while training, of the adapter that was kept: the last one, if no other was.

    Args:
        history: with at least one validation.
    """
    return float((history.facts["kept"] or history.facts["validation"][-1])[1])


def last_steps(steps: Sequence[Step]) -> Sequence[Step]:
    """The steps that end a training: ten, or the last quarter where that is fewer, and one at least.

    Args:
        steps: lines of a history, in their order.
    """
    return steps[-max(1, min(LAST, len(steps) // 4)) :]


def final_training_loss(steps: Sequence[Step]) -> float:
    """Nats per supervised token over the last steps, each measured before its update.

    Args:
        steps: lines of a history with `loss` and `supervised_tokens`.
    """
    last = last_steps(steps)
    total = math.fsum(step["loss"] * step["supervised_tokens"] for step in last)
    return total / sum(step["supervised_tokens"] for step in last)
