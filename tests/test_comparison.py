"""Measures of answers, the table's marks and the verdict, on figures whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.comparison import Measure
from tasks.comparison_table import published_rows, table, verdict
from tasks.quality import is_json, matrix, measure, repetition

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


def test_the_verdict_needs_two_methods_and_held_out_rows() -> None:
    assert "nothing to compare" in verdict([losses({"grit": 0.0})], ("grit",), 0.95)["text"]
    assert "Nothing was held out" in verdict([], METHODS, 0.95)["text"]


def test_published_figures_stand_beside_the_nearest_of_ours() -> None:
    ours = {"name": "final training loss, nats per supervised token", "cells": {"grit": {"text": "0.5"}}}
    rows = {row["name"]: row for row in published_rows([ours])}
    assert rows["final training loss"]["cells"] == {"grit": "0.5"}
    assert "padding" in rows["final training loss"]["measured"]
    assert rows["first logged loss"]["cells"] == {}


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
