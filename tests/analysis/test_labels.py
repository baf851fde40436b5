"""Words of a comparison can be changed, and nothing is found or lost by them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tasks.analysis.all_metrics import all_metrics
from tasks.analysis.labels import GROUPS, LABELS, READINGS, label
from tests.support.made_up_comparison import MACHINE, MadeUp, by_method

METHODS = ("baseline", "grit")
pytestmark = pytest.mark.usefixtures("fewer_resamples")


def test_every_row_has_words_and_a_group_of_its_own_key(outputs: MadeUp) -> None:
    metrics = all_metrics(by_method(outputs.runs(METHODS, 1)), outputs.base)
    words = {metric.key: label(metric) for metric in metrics}
    assert len(words) == len(set(words.values())) == len(metrics)
    assert not any("{" in text for text in words.values())
    assert {metric.group for metric in metrics} == GROUPS.keys()
    assert words["lm_eval:arc:acc"] == "arc: acc (6 documents)"
    assert words["steps_to_reference"] == "steps to reach baseline's final validation loss"


def test_no_words_are_left_of_rows_that_there_are_not(outputs: MadeUp) -> None:
    runs = outputs.runs(METHODS, 1)
    answer = {"answer": {"tokens_per_second": 9.0}}
    answering = [run.model_copy(update={"gguf": run.gguf.model_copy(update={"facts": answer})}) for run in runs]
    keys = {metric.key for metric in all_metrics(by_method(answering), outputs.base)}
    assert {key if key in LABELS else key.partition(":")[0] for key in keys} == LABELS.keys()


def without_words(data: Any) -> Any:
    """A report's data without what is made of labels."""
    if isinstance(data, dict):
        return {key: without_words(value) for key, value in data.items() if key not in ("name", "ours", "reading")}
    return [without_words(value) for value in data] if isinstance(data, list) else data


def test_other_words_change_no_look_up(outputs: MadeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = list(outputs.runs(METHODS, 2))
    fast = outputs.history(0.0, 3408, machine=MACHINE | {"processor": "CPU Y"})
    runs[-1] = runs[-1].model_copy(update={"history": fast})
    reports = [outputs.report(tuple(runs))]
    for table in (LABELS, READINGS, GROUPS):
        for number, key in enumerate(table):
            monkeypatch.setitem(table, key, f"words {number}")
    reports.append(outputs.report(tuple(runs)))
    before, after = (json.loads((report.path / "report.json").read_text()) for report in reports)
    for part in ("table", "published", "wins"):
        assert without_words(after[part]) == without_words(before[part]), part
    assert after["verdict"]["tone"] == before["verdict"]["tone"]
    html = (reports[1].path / "report.html").read_text()
    assert "of trainings on different machines, see Provenance: no best is marked" in html
    for row, changed in zip(before["table"], after["table"], strict=True):
        assert f"<td>{row['name']}</td>" not in html
        assert f"<td>{changed['name']}</td>" in html and changed["name"].startswith("words ")
