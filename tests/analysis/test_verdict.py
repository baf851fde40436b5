"""The verdict of a comparison, on figures whose truth is known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tasks.analysis.labels import label, sentence
from tasks.analysis.metric import Metric
from tasks.analysis.verdict import verdict
from tasks.stats.estimates import Estimate
from tests.support.metrics import METHODS, loss_metric


@pytest.mark.parametrize(
    ("shift", "tone", "reading"), [(-0.2, "better", "better"), (0.2, "worse", "worse"), (0.0, "", "within error")]
)
def test_the_verdict_is_the_differences_own(shift: float, tone: str, reading: str) -> None:
    conclusion = verdict([loss_metric({"baseline": 0.0, "grit": shift})], METHODS[:2], 0.95)
    assert conclusion["tone"] == tone
    assert f": {reading})." in conclusion["text"]
    assert "interval" in conclusion["text"]


def test_one_seed_gives_no_verdict() -> None:
    metric = loss_metric({"baseline": 0.0, "grit": -0.2})
    metric.values = {method: values[:1] for method, values in metric.values.items()}
    conclusion = verdict([metric], METHODS[:2], 0.95)
    assert conclusion["tone"] == "" and "one seed, which says nothing of others" in conclusion["text"]
    assert metric.best(0.95) is None


def test_what_is_lost_elsewhere_takes_the_verdicts_colour() -> None:
    main, elsewhere = loss_metric({"baseline": 0.0, "grit": -0.2}), loss_metric({"baseline": 0.0, "grit": 0.2})
    assert verdict([main, elsewhere], METHODS[:2], 0.95)["tone"] == ""
    assert verdict([main, main], METHODS[:2], 0.95)["tone"] == "better"


@pytest.mark.parametrize(
    ("shifts", "tone"),
    [((-0.2, 0.2), "better"), ((0.0, 0.2), "worse"), ((0.2, 0.2), "worse"), ((-0.2, 0.0), "better"), ((0.0, 0.0), "")],
)
def test_a_worse_method_does_not_hide_a_better_one(shifts: tuple[float, float], tone: str) -> None:
    main = loss_metric({"baseline": 0.0, "grit": shifts[0], "lora_fa": shifts[1]})
    assert verdict([main], METHODS, 0.95)["tone"] == tone


def test_a_better_method_that_is_worse_elsewhere_is_not_good_news_but_another_may_be() -> None:
    main = loss_metric({"baseline": 0.0, "grit": -0.2, "lora_fa": -0.2})
    elsewhere = loss_metric({"baseline": 0.0, "grit": 0.2, "lora_fa": 0.0})
    assert verdict([main, elsewhere], METHODS, 0.95)["tone"] == "better"
    elsewhere = loss_metric({"baseline": 0.0, "grit": 0.2, "lora_fa": 0.2})
    assert verdict([main, elsewhere], METHODS, 0.95)["tone"] == ""


def test_the_verdict_names_the_bootstrap_where_it_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = loss_metric({"baseline": 0.0, "grit": -0.2})
    assert "bootstrap" not in verdict([metric], METHODS[:2], 0.95)["text"]
    estimate = Estimate(-0.2, 0.01, (-0.25, -0.15), (-0.4, 0.1))
    monkeypatch.setattr(Metric, "difference", lambda *_: estimate)
    text = verdict([metric], METHODS[:2], 0.95)["text"]
    assert "but the bootstrap's -0.4000 to +0.1000: within error" in text


def test_many_differences_of_one_seed_are_not_called_small() -> None:
    metric = loss_metric({"baseline": 0.0, "grit": -0.2})
    metric.values = {method: values[:1] for method, values in metric.values.items()}
    text = verdict([metric] * 6, METHODS[:2], 0.95)["text"]
    assert text.endswith("All 5 differences elsewhere are of one seed.")


def test_the_second_sentence_stays_short() -> None:
    shifts = {"baseline": 0.0, "grit": 0.0, "lora_fa": 0.0}
    main, better, same = loss_metric(shifts), loss_metric({**shifts, "grit": -0.2}), loss_metric(shifts)
    better.key = "second_validation_loss"
    text = verdict([main, better, same, same], METHODS, 0.95)["text"].split(". ", 1)[1]
    assert text.startswith(
        "Loss on the second data set, nats per supervised token (50 rows): grit -0.2"
    ) and text.endswith(
        "; 5 other differences in held-out measures lie within their error; "
        "of 6 tested at 0.975 each, 0.15 would exceed their error by chance."
    )
    text = verdict([main, same, same, same], METHODS, 0.95)["text"].split(". ", 1)[1]
    assert text == "All 6 differences elsewhere lie within their error."


def test_the_verdict_needs_two_methods_and_held_out_rows() -> None:
    assert "nothing to compare" in verdict([loss_metric({"grit": 0.0})], ("grit",), 0.95)["text"]
    assert "Nothing was held out" in verdict([], METHODS, 0.95)["text"]


def test_a_difference_whose_error_is_unknown_is_not_called_small() -> None:
    main = loss_metric({"baseline": 0.0, "grit": -0.2})
    values = {"baseline": np.zeros((3, 50)), "grit": np.ones((3, 50))}
    certain = Metric(
        "answers:json_valid", "test", "higher", values, counts=np.ones(50), facts={"meaning": "valid JSON"}
    )
    text = verdict([main, certain, *[loss_metric({"baseline": 0.0, "grit": 0.0})] * 5], METHODS[:2], 0.95)["text"]
    assert "Valid JSON (50 answers): grit +1.0000" in text and "(equal for all seeds, error unknown)" in text
    assert "5 other differences in held-out measures lie within their error" in text


def test_answers_count_in_the_verdict_where_nothing_else_was_held_out() -> None:
    main, answers = (loss_metric({"baseline": 0.0, "grit": shift}) for shift in (-0.2, 0.2))
    answers = dataclasses.replace(answers, key="answers:repetition", group="answers", facts={"meaning": "repetition"})
    conclusion = verdict([main, answers], METHODS[:2], 0.95)
    assert (
        conclusion["tone"] == ""
        and "Repetition (50 answers): grit +0.199" in conclusion["text"]
        and "(worse)" in conclusion["text"]
    )
    assert "epetition" not in verdict([main, main, answers], METHODS[:2], 0.95)["text"]
    assert verdict([main], METHODS[:2], 0.95)["text"].endswith("Nothing else was held out.")


@pytest.mark.parametrize(("group", "key"), [("second", "second_validation_loss"), ("forgetting", "forgetting")])
def test_what_is_lost_on_other_text_is_in_the_verdict(group: str, key: str) -> None:
    main = loss_metric({"baseline": 0.0, "grit": -0.2})
    other = loss_metric({"baseline": 0.0, "grit": 0.2}, key, group)
    conclusion = verdict([main, other], METHODS[:2], 0.95)
    assert conclusion["tone"] == "" and f"{sentence(label(other))}: grit +0.199" in conclusion["text"]
