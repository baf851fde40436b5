"""What an answer is worth, beside its loss."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.evaluation.quality import is_json, matrix, measure_answer, repetition


def test_answers_are_measured() -> None:
    metrics = measure_answer('{"a": 1}', '{"a": 1}', True)
    assert metrics == {"rouge_l": 1, "exact_match": 1, "stopped": 1, "repetition": 0, "json_valid": 1}
    assert measure_answer('{"a": 1', '{"a": 1}', True)["json_valid"] == 0
    plain = measure_answer("the cat sat", "the cat sat on the mat", False)
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


def test_a_metric_that_some_prompts_lack_is_taken_over_the_others() -> None:
    runs = [[{"x": 1.0}, {"y": 2.0}, {"x": 3.0}], [{"x": 5.0}, {"y": 6.0}, {"x": 7.0}]]
    values = matrix(runs, "x")
    assert values is not None and values.tolist() == [[1, 3], [5, 7]]
    assert matrix(runs, "z") is None
