"""Scores of lm-eval that are no number, or are not there."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tasks.analysis.lm_eval_metrics import lm_eval_metrics
from tasks.analysis.table import table
from tasks.analysis.verdict import verdict
from tests.support.made_up_comparison import PROMPTS, MadeUp, by_method

METHODS = ("baseline", "grit")
pytestmark = pytest.mark.usefixtures("fewer_resamples")


class TestLmEval:
    """Scores that are no number, or are not there."""

    def metrics(self, outputs: MadeUp, change: Callable[[MadeUp], None], of_base: bool) -> list[Any]:
        runs = list(outputs.runs(METHODS, 2))
        before = outputs.lm_eval, outputs.documents
        outputs.lm_eval, outputs.documents = json.loads(json.dumps(before))
        change(outputs)
        changed = outputs.scores(0.1)
        if of_base:
            outputs.base = outputs.base.model_copy(update={"scores": changed})
        else:
            runs[-1] = runs[-1].model_copy(update={"scores": changed})
        return lm_eval_metrics(by_method(runs), outputs.base.scores)

    @staticmethod
    def no_number(outputs: MadeUp) -> None:
        outputs.lm_eval["arc"]["acc"]["value"] = None
        outputs.documents = {"arc": {}}

    @staticmethod
    def one_nan(outputs: MadeUp) -> None:
        outputs.documents["arc"]["acc"][0] = float("nan")

    @staticmethod
    def nothing(outputs: MadeUp) -> None:
        outputs.lm_eval, outputs.documents = {}, {}

    @pytest.mark.parametrize("change", ["no_number", "nothing"])
    def test_a_run_without_a_number_leaves_its_method_out_of_the_row(self, outputs: MadeUp, change: str) -> None:
        (metric,) = self.metrics(outputs, getattr(self, change), of_base=False)
        assert list(metric.values) == ["baseline"] and metric.values["baseline"].shape == (2, PROMPTS)
        (row,) = table([metric], METHODS, 0.95)
        assert row["cells"]["grit"]["text"] == "not a number with seed 3408"
        json.dumps(row, allow_nan=False)
        assert "Nothing was held out" in verdict([metric], METHODS, 0.95)["text"]

    def test_a_document_that_is_no_number_costs_the_pairing_by_documents(self, outputs: MadeUp) -> None:
        (metric,) = self.metrics(outputs, self.one_nan, of_base=False)
        assert metric.counts is None and metric.values["grit"].tolist() == [0.5, 0.5]

    def test_a_base_without_a_number_is_not_compared_with(self, outputs: MadeUp) -> None:
        (metric,) = self.metrics(outputs, self.no_number, of_base=True)
        assert metric.base is None and metric.values["grit"].tolist() == [0.5, 0.5]
        (row,) = table([metric], METHODS, 0.95)
        assert row["base"] is None and "to_base" not in row["cells"]["grit"]

    def test_a_base_without_the_task_has_no_row(self, outputs: MadeUp) -> None:
        assert self.metrics(outputs, self.nothing, of_base=True) == []
