"""Measures of answers, the table's marks and the verdict, on figures whose truth is known."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.analysis.all_measures import reached
from tasks.analysis.compared_runs import ComparedRun
from tasks.analysis.measure import Measure, won
from tasks.analysis.study_comparison import published_rows
from tasks.analysis.table import comparable, table
from tasks.analysis.verdict import verdict
from tasks.engine.artifacts import reference
from tasks.evaluation.quality import is_json, matrix, measure, repetition
from tasks.training.history import steps_to_kept

METHODS = ("baseline", "grit", "lora_fa")


def losses(shifts: dict[str, float], spread: float = 0.01) -> Measure:
    """Three seeds and fifty rows of ten tokens; methods differ by a shift per token and some noise."""
    generator = np.random.default_rng(1)
    rows = generator.normal(1.5, 0.5, 50)
    values = {m: 10 * (rows + shift + generator.normal(0, spread, (3, 50))) for m, shift in shifts.items()}
    name = "validation loss"
    return Measure(name, "lower", values, counts=np.full(50, 10), base=10 * rows[None] + 20, group="loss")


def test_the_best_is_marked_only_where_it_beats_every_other() -> None:
    assert losses({"baseline": 0.0, "grit": -0.2, "lora_fa": -0.1}).best(0.95) == "grit"
    assert losses({"baseline": 0.0, "grit": -0.2, "lora_fa": -0.2}).best(0.95) is None
    assert losses({"baseline": 0.0, "grit": 0.0}).best(0.95) is None
    higher = losses({"baseline": 0.0, "grit": -0.2})
    higher.better = "higher"
    assert higher.best(0.95) == "baseline"
    higher.better = None
    assert higher.best(0.95) is None
    assert losses({"baseline": 0.0}).best(0.95) is None
    lacking = losses({"baseline": 0.0, "grit": -0.2})
    lacking.notes = {"lora_fa": "not told"}
    assert lacking.best(0.95) is None, "with a method that has no value it is not compared"


def test_a_row_of_the_table_says_what_its_numbers_say() -> None:
    (row,) = table([losses({"baseline": 0.0, "grit": -0.2})], METHODS[:2], 0.95)
    cell = row["cells"]["grit"]
    assert cell["best"] and not row["cells"]["baseline"]["best"]
    assert cell["to_reference"]["value"] == pytest.approx(-0.2, abs=0.01)
    assert cell["to_reference"]["reading"] == "better"
    assert cell["to_base"]["reading"] == "better"
    assert "to_reference" not in row["cells"]["baseline"]
    steps = Measure("steps", "lower", {"baseline": np.array([4.0, 4])}, notes={"grit": "x"}, group="cost")
    (unreached,) = table([steps], METHODS[:2], 0.95)
    assert unreached["cells"]["grit"]["text"] == "x"


@pytest.mark.parametrize(
    ("shift", "tone", "reading"), [(-0.2, "better", "better"), (0.2, "worse", "worse"), (0.0, "", "within error")]
)
def test_the_verdict_is_the_differences_own(shift: float, tone: str, reading: str) -> None:
    said = verdict([losses({"baseline": 0.0, "grit": shift})], METHODS[:2], 0.95)
    assert said["tone"] == tone
    assert f": {reading})." in said["text"]
    assert "interval" in said["text"]


def test_one_seed_gives_no_verdict() -> None:
    measure = losses({"baseline": 0.0, "grit": -0.2})
    measure.values = {method: values[:1] for method, values in measure.values.items()}
    said = verdict([measure], METHODS[:2], 0.95)
    assert said["tone"] == "" and "one seed, which says nothing of others" in said["text"]
    assert measure.best(0.95) is None


def test_what_is_lost_elsewhere_takes_the_verdicts_colour() -> None:
    main, elsewhere = losses({"baseline": 0.0, "grit": -0.2}), losses({"baseline": 0.0, "grit": 0.2})
    assert verdict([main, elsewhere], METHODS[:2], 0.95)["tone"] == ""
    assert verdict([main, main], METHODS[:2], 0.95)["tone"] == "better"


@pytest.mark.parametrize(
    ("shifts", "tone"),
    [((-0.2, 0.2), "better"), ((0.0, 0.2), "worse"), ((0.2, 0.2), "worse"), ((-0.2, 0.0), "better"), ((0.0, 0.0), "")],
)
def test_a_worse_method_does_not_hide_a_better_one(shifts: tuple[float, float], tone: str) -> None:
    main = losses({"baseline": 0.0, "grit": shifts[0], "lora_fa": shifts[1]})
    assert verdict([main], METHODS, 0.95)["tone"] == tone


def test_a_better_method_that_is_worse_elsewhere_is_not_good_news_but_another_may_be() -> None:
    main = losses({"baseline": 0.0, "grit": -0.2, "lora_fa": -0.2})
    elsewhere = losses({"baseline": 0.0, "grit": 0.2, "lora_fa": 0.0})
    assert verdict([main, elsewhere], METHODS, 0.95)["tone"] == "better"
    elsewhere = losses({"baseline": 0.0, "grit": 0.2, "lora_fa": 0.2})
    assert verdict([main, elsewhere], METHODS, 0.95)["tone"] == ""


def test_the_verdict_names_the_bootstrap_where_it_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = losses({"baseline": 0.0, "grit": -0.2})
    assert "bootstrap" not in verdict([measure], METHODS[:2], 0.95)["text"]
    monkeypatch.setattr("tasks.stats.estimates._bootstrap", lambda *_: (-0.4, 0.1))
    text = verdict([measure], METHODS[:2], 0.95)["text"]
    assert "but the bootstrap's -0.4000 to +0.1000: within error" in text


def test_many_differences_of_one_seed_are_not_called_small() -> None:
    measure = losses({"baseline": 0.0, "grit": -0.2})
    measure.values = {method: values[:1] for method, values in measure.values.items()}
    text = verdict([measure] * 6, METHODS[:2], 0.95)["text"]
    assert text.endswith("All 5 differences elsewhere are of one seed.")


def test_the_second_sentence_stays_short() -> None:
    shifts = {"baseline": 0.0, "grit": 0.0, "lora_fa": 0.0}
    main, better, same = losses(shifts), losses({**shifts, "grit": -0.2}), losses(shifts)
    better.name = "other loss"
    text = verdict([main, better, same, same], METHODS, 0.95)["text"].split(". ", 1)[1]
    assert text.startswith("Other loss: grit -0.2") and text.endswith(
        "; 5 other differences in held-out measures lie within their error; "
        "of 6 tested at 0.975 each, 0.15 would exceed their error by chance."
    )
    text = verdict([main, same, same, same], METHODS, 0.95)["text"].split(". ", 1)[1]
    assert text == "All 6 differences elsewhere lie within their error."


def test_steps_to_a_loss_are_read_between_validations(tmp_path: Path) -> None:
    lines = [{"step": step, "seconds": 2.0, "loss": 1.0, "supervised_tokens": 1} for step in range(1, 31)]
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = {"validation": [(10, 3.0), (20, 2.0), (30, 1.0)], "basis_seconds": 5.0, "kept": (20, 2.0)}
    history = reference("history", tmp_path, ["history.jsonl"], facts)
    others = dict.fromkeys(("adapter", "scores", "gguf", "answers", "forgetting"), history)
    run = ComparedRun(method="baseline", seed=1, history=history, **others)
    assert reached(run, 1.5) == (25, 5 + 50)
    assert reached(run, 3.5) == (10, 5 + 20), "not before the first"
    assert reached(run, 0.5) is None
    assert len(steps_to_kept(history)) == 20, "the training loss is that of the adapter that was kept"


def test_perplexities_are_paired_by_row_as_their_losses_are() -> None:
    loss = losses({"baseline": 0.0, "grit": -0.2})
    perplexity = dataclasses.replace(loss, name="perplexity", better=None, exponential=True)
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
    (row,) = table([losses({"baseline": 0.0, "grit": -0.2})], METHODS[:2], 0.95)
    first, student, bootstrap, to_base = row["cells"]["grit"]["notes"]
    assert re.fullmatch(r"-0\.\d+ ± 0\.\d+ to baseline", first) and to_base.endswith(" to base")
    assert student.startswith("t -0.") and bootstrap.startswith("bootstrap -0.")


def test_wins_ties_and_losses_are_shares_with_intervals() -> None:
    sign = np.random.default_rng(1).choice([-1, 0, 1], size=(3, 40), p=[0.1, 0.3, 0.6])
    found = won(sign, 0.95)
    assert found["win"].value == pytest.approx((sign > 0).mean())
    assert found["win"].value + found["tie"].value + found["loss"].value == pytest.approx(1)
    assert found["net"].exceeds_error
    for name in ("win", "tie", "loss"):
        low, high = found[name].interval
        assert 0 <= low < found[name].value < high <= 1
    assert won(sign[:, :3], 0.95)["loss"].interval[0] == 0, "a share is not below nothing"
    assert not won(sign[:1], 0.95)["net"].repeated


def test_costs_of_different_machines_are_not_compared() -> None:
    cost = Measure("seconds", "lower", {"baseline": np.array([9.0, 9.1]), "grit": np.array([1.0, 1.2])}, group="cost")
    assert [one.best(0.95) for one in comparable([cost], same_machine=True)] == ["grit"]
    assert [one.best(0.95) for one in comparable([cost], same_machine=False)] == [None]
    loss = losses({"baseline": 0.0, "grit": -0.2})
    assert [one.best(0.95) for one in comparable([loss], same_machine=False)] == ["grit"]


def test_the_verdict_needs_two_methods_and_held_out_rows() -> None:
    assert "nothing to compare" in verdict([losses({"grit": 0.0})], ("grit",), 0.95)["text"]
    assert "Nothing was held out" in verdict([], METHODS, 0.95)["text"]


def test_a_difference_whose_error_is_unknown_is_not_called_small() -> None:
    main = losses({"baseline": 0.0, "grit": -0.2})
    values = {"baseline": np.zeros((3, 50)), "grit": np.ones((3, 50))}
    certain = Measure("valid JSON", "higher", values, counts=np.ones(50), base=np.zeros((1, 50)), group="test")
    text = verdict([main, certain, *[losses({"baseline": 0.0, "grit": 0.0})] * 5], METHODS[:2], 0.95)["text"]
    assert "Valid JSON: grit +1.0000" in text and "(equal for all seeds, error unknown)" in text
    assert "5 other differences in held-out measures lie within their error" in text


def test_answers_count_in_the_verdict_where_nothing_else_was_held_out() -> None:
    main, answers = (losses({"baseline": 0.0, "grit": shift}) for shift in (-0.2, 0.2))
    answers.group, answers.name = "answers", "repetition"
    said = verdict([main, answers], METHODS[:2], 0.95)
    assert said["tone"] == "" and "Repetition: grit +0.199" in said["text"] and "(worse)" in said["text"]
    assert "epetition" not in verdict([main, main, answers], METHODS[:2], 0.95)["text"]
    assert verdict([main], METHODS[:2], 0.95)["text"].endswith("Nothing else was held out.")


@pytest.mark.parametrize("group", ["second", "forgetting"])
def test_what_is_lost_on_other_text_is_in_the_verdict(group: str) -> None:
    main, other = (losses({"baseline": 0.0, "grit": shift}) for shift in (-0.2, 0.2))
    other.group, other.name = group, "loss on other text"
    said = verdict([main, other], METHODS[:2], 0.95)
    assert said["tone"] == "" and "Loss on other text: grit +0.199" in said["text"]


def test_published_figures_stand_beside_the_nearest_of_ours() -> None:
    ours = {"name": "final training loss, nats per supervised token", "cells": {"grit": {"text": "0.5"}}}
    rows = {row["name"]: row for row in published_rows([ours])}
    assert rows["final training loss"]["cells"] == {"grit": "0.5"}
    assert "padding" in rows["final training loss"]["measured"]
    assert rows["final training loss"]["ours"] == ours["name"]
    assert rows["first logged loss"]["cells"] == {} and rows["first logged loss"]["ours"] is None


def test_what_the_study_published_in_minutes_stands_beside_minutes_of_ours() -> None:
    seconds = Measure("seconds of all steps", "lower", {"grit": np.array([60.0, 120])}, 1, group="cost")
    memory = Measure("peak memory, GB (resident set)", "lower", {"grit": np.array([2.5, 2.5])}, 2, group="cost")
    rows = {row["name"]: row for row in published_rows(table([seconds, memory], ("grit",), 0.95))}
    assert rows["training time"]["ours"] == "seconds of all steps, in min"
    assert rows["training time"]["cells"] == {"grit": "1.50 ± 0.50 min"}
    assert rows["GPU memory"]["ours"] == "peak memory, GB (resident set)", "it is another memory"


def test_answers_are_measured() -> None:
    found = measure('{"a": 1}', '{"a": 1}', True)
    assert found == {"rouge_l": 1, "exact_match": 1, "stopped": 1, "repetition": 0, "json_valid": 1}
    assert measure('{"a": 1', '{"a": 1}', True)["json_valid"] == 0
    plain = measure("the cat sat", "the cat sat on the mat", False)
    assert "json_valid" not in plain and plain["stopped"] == plain["exact_match"] == 0
    # Three words in common, in order: recall 3/6, precision 3/3.
    assert plain["rouge_l"] == pytest.approx(2 * 0.5 * 1 / 1.5)
    assert [is_json(text) for text in ("[1]", '"x"', "{", "[" * 100_000)] == [True, False, False, False]


@given(st.lists(st.sampled_from("abc"), max_size=30))
def test_repetition_is_the_share_of_grams_seen_before(words: list[str]) -> None:
    seen: set[tuple[str, ...]] = set()
    again = 0
    for start in range(len(words) - 3):
        gram = tuple(words[start : start + 4])
        again += gram in seen
        seen.add(gram)
    assert repetition(words) == pytest.approx(again / max(1, len(words) - 3))


def test_a_measure_that_some_prompts_lack_is_taken_over_the_others() -> None:
    runs = [[{"x": 1.0}, {"y": 2.0}, {"x": 3.0}], [{"x": 5.0}, {"y": 6.0}, {"x": 7.0}]]
    found = matrix(runs, "x")
    assert found is not None and found.tolist() == [[1, 3], [5, 7]]
    assert matrix(runs, "z") is None
