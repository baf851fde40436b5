"""The study's published figures beside those of a comparison."""

from __future__ import annotations

import numpy as np
import pytest

from tasks.analysis import study_comparison
from tasks.analysis.all_metrics import all_metrics
from tasks.analysis.metric import Metric
from tasks.analysis.published_study import PUBLISHED, Published
from tasks.analysis.study_comparison import published_rows
from tasks.analysis.table import table
from tests.support.made_up_comparison import MadeUp, by_method

pytestmark = pytest.mark.usefixtures("fewer_resamples")


def test_published_figures_stand_beside_the_nearest_of_ours() -> None:
    ours = {"key": "training_loss", "name": "any words", "cells": {"grit": {"text": "0.5"}}}
    rows = {row["key"]: row for row in published_rows([ours])}
    assert rows["training_loss"]["cells"] == {"grit": "0.5"}
    assert "padding" in rows["training_loss"]["measured"]
    assert rows["training_loss"]["ours"] == "any words"
    assert rows["first_loss"]["cells"] == {} and rows["first_loss"]["ours"] is None


def test_what_the_study_published_in_minutes_stands_beside_minutes_of_ours() -> None:
    seconds = Metric("total_seconds", "cost", "lower", {"grit": np.array([60.0, 120])}, digits=1)
    memory = Metric("peak_memory", "cost", "lower", {"grit": np.array([2.5, 2.5])}, facts={"kinds": "resident set"})
    rows = {row["key"]: row for row in published_rows(table([seconds, memory], ("grit",), 0.95))}
    assert rows["training_time"]["ours"] == "seconds of all steps, in min"
    assert rows["training_time"]["cells"] == {"grit": "1.50 ± 0.50 min"}
    assert rows["gpu_memory"]["ours"] == "peak memory, GB (resident set)", "it is another memory"


def test_every_row_of_the_study_finds_the_one_of_ours_that_it_names(outputs: MadeUp) -> None:
    keys = {metric.key for metric in all_metrics(by_method(outputs.runs(("grit",), 1)), outputs.base)}
    assert {published.ours for published in PUBLISHED} - {None} <= keys
    assert len({published.key for published in PUBLISHED}) == len(PUBLISHED)


def test_a_further_row_of_the_study_needs_an_entry_only(outputs: MadeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    size = Published(key="size", name="file", baseline="1", grit="2", measured="a file", ours="gguf_size")
    monkeypatch.setattr(study_comparison, "PUBLISHED", (*PUBLISHED, size))
    text = (outputs.report(outputs.runs(("baseline", "grit"), 1)).path / "report.md").read_text()
    assert "| file | 1 | 2 | a file | GGUF, MB | 0.00 | 0.00 |" in text
