"""The cells of a comparison, on figures whose truth is known."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from tasks.analysis.metric import Metric
from tasks.analysis.table import comparable, table
from tasks.analysis.verdict import verdict
from tests.support.metrics import METHODS, loss_metric


def test_a_row_of_the_table_says_what_its_numbers_say() -> None:
    (row,) = table([loss_metric({"baseline": 0.0, "grit": -0.2})], METHODS[:2], 0.95)
    cell = row["cells"]["grit"]
    assert cell["best"] and not row["cells"]["baseline"]["best"]
    assert cell["to_reference"]["value"] == pytest.approx(-0.2, abs=0.01)
    assert cell["to_reference"]["reading"] == "better"
    assert cell["to_base"]["reading"] == "better"
    assert "to_reference" not in row["cells"]["baseline"]
    steps = Metric(
        "steps_to_reference",
        "cost",
        "lower",
        {"baseline": np.array([4.0, 4])},
        notes={"grit": "x"},
        facts={"reference": "baseline"},
    )
    (unreached,) = table([steps], METHODS[:2], 0.95)
    assert unreached["cells"]["grit"]["text"] == "x"


def test_perplexities_are_paired_by_row_as_their_losses_are() -> None:
    loss = loss_metric({"baseline": 0.0, "grit": -0.2})
    perplexity = dataclasses.replace(loss, key="perplexity", better=None, exponential=True)
    (row,) = table([perplexity], METHODS[:2], 0.95)
    mean, change = loss.estimate("grit", 0.95), loss.difference("grit", "baseline", 0.95)
    cell = row["cells"]["grit"]
    assert cell["estimate"]["value"] == pytest.approx(np.exp(mean.value))
    assert cell["estimate"]["stderr"] == pytest.approx(np.exp(mean.value) * mean.stderr)
    assert cell["to_reference"]["value"] == pytest.approx(np.exp(-0.2), rel=0.01), "a ratio"
    assert cell["to_reference"]["interval"] == pytest.approx(np.exp(change.interval))
    assert cell["to_reference"]["reading"] == "different"
    assert cell["notes"][0].startswith("×0.8") and row["paired_by"] == "seed and row"
    assert row["base"] == f"{np.exp(loss.base.sum() / 500):,.4f}"
    assert "perplexity" not in verdict([loss, perplexity], METHODS[:2], 0.95)["text"], "it says the same as the loss"


def test_a_difference_names_its_intervals() -> None:
    (row,) = table([loss_metric({"baseline": 0.0, "grit": -0.2})], METHODS[:2], 0.95)
    first, student, bootstrap, to_base = row["cells"]["grit"]["notes"]
    assert re.fullmatch(r"-0\.\d+ ± 0\.\d+ to baseline", first) and to_base.endswith(" to base")
    assert student.startswith("t -0.") and bootstrap.startswith("bootstrap -0.")


def test_costs_of_different_machines_are_not_compared() -> None:
    cost = Metric("total_seconds", "cost", "lower", {"baseline": np.array([9.0, 9.1]), "grit": np.array([1.0, 1.2])})
    assert [metric.best(0.95) for metric in comparable([cost], same_machine=True)] == ["grit"]
    assert [metric.best(0.95) for metric in comparable([cost], same_machine=False)] == [None]
    loss = loss_metric({"baseline": 0.0, "grit": -0.2})
    assert [metric.best(0.95) for metric in comparable([loss], same_machine=False)] == ["grit"]
