"""Losses of a comparison: while training, on the validation rows, and on texts elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tasks.analysis.metric import Metric, Runs
from tasks.engine.artifacts import Artifact
from tasks.stats.json_files import read_json
from tasks.stats.score_differences import VALIDATION_LOSS
from tasks.training.history import final_training_loss, kept_loss, steps_to_kept


def loss_metrics(runs: Runs, base: Artifact) -> list[Metric]:
    """Training loss, validation loss, and what lies between the two.

    Args:
        runs: by method.
        base: the base model's scores.
    """
    training = {
        method: np.array([final_training_loss(steps_to_kept(run.history)) for run in of_method])
        for method, of_method in runs.items()
    }
    metrics = [Metric("training_loss", "loss", "lower", training)]
    base_rows = _row_losses(base)["validation"]
    return [*metrics, *_validation_metrics(runs, base_rows, training)] if base_rows else metrics


def _validation_metrics(runs: Runs, base: dict[str, Any], training: Mapping[str, np.ndarray]) -> list[Metric]:
    """What needs validation rows.

    Args:
        runs: by method.
        base: the rows' losses by the base model.
        training: the final training losses of each method.
    """
    counts = np.array(base["supervised_tokens"])
    sums = {
        method: np.array([_row_losses(run.scores)["validation"]["nll"] for run in of_method])
        for method, of_method in runs.items()
    }
    losses = {method: of_method.sum(axis=1) / counts.sum() for method, of_method in sums.items()}
    as_trained = {method: np.array([kept_loss(run.history) for run in of_method]) for method, of_method in runs.items()}
    lowest = {
        method: np.array([min(run.history.facts["validation"], key=lambda point: point[1])[0] for run in of_method])
        for method, of_method in runs.items()
    }
    by_row: dict[str, Any] = {"counts": counts, "base": np.array([base["nll"]])}
    return [
        Metric(VALIDATION_LOSS, "loss", "lower", sums, **by_row),
        Metric("perplexity", "loss", None, sums, **by_row, exponential=True),
        Metric("generalization_gap", "loss", None, {m: losses[m] - training[m] for m in runs}),
        Metric("merging_cost", "loss", None, {m: losses[m] - as_trained[m] for m in runs}),
        Metric("lowest_loss_step", "loss", None, lowest, digits=1),
    ]


def forgetting_metrics(runs: Runs, base: Artifact) -> list[Metric]:
    """The loss on a text that nothing was trained on.

    Args:
        runs: by method.
        base: the base model's.
    """
    losses = {method: [run.forgetting for run in of_method] for method, of_method in runs.items()}
    return [_loss_elsewhere("forgetting", "forgetting", base, losses)]


def second_metrics(runs: Runs, base: Artifact | None) -> list[Metric]:
    """The loss on the second data set, if there is one.

    Args:
        runs: by method.
        base: the base model's.
    """
    if base is None:
        return []
    losses = {method: [run.second for run in of_method if run.second] for method, of_method in runs.items()}
    return [_loss_elsewhere("second_validation_loss", "second", base, losses)]


def _loss_elsewhere(key: str, group: str, base: Artifact, losses: Mapping[str, Sequence[Artifact]]) -> Metric:
    """Losses out of `rows.json` of each artifact."""
    base_rows = _row_losses(base)
    sums = {
        method: np.array([_row_losses(artifact)["nll"] for artifact in of_method])
        for method, of_method in losses.items()
    }
    counts = np.array(base_rows["supervised_tokens"])
    return Metric(key, group, "lower", sums, counts=counts, base=np.array([base_rows["nll"]]))


def _row_losses(artifact: Artifact) -> Any:
    return read_json(artifact.path / "rows.json")
