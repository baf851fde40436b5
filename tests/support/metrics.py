"""Rows of a comparison's table whose truth is known."""

from __future__ import annotations

import numpy as np

from tasks.analysis.metric import Metric

METHODS = ("baseline", "grit", "lora_fa")


def loss_metric(shifts: dict[str, float], key: str = "validation_loss", group: str = "loss") -> Metric:
    """Three seeds and fifty rows of ten tokens; methods differ by a shift per token and some noise."""
    generator = np.random.default_rng(1)
    rows = generator.normal(1.5, 0.5, 50)
    values = {m: 10 * (rows + shift + generator.normal(0, 0.01, (3, 50))) for m, shift in shifts.items()}
    return Metric(key, group, "lower", values, counts=np.full(50, 10), base=10 * rows[None] + 20)
