"""The report's judgement, and what it shows where rows and answers are hostile or nothing was held out."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tasks.engine.artifacts import Artifact, Store
from tasks.report.sections import verdict
from tasks.settings.presets import load_settings
from tasks.stats.score_differences import ScoreDifference, lm_eval_rows, validation_row
from tasks.write_report import write_report
from tests.support.made_artifacts import HOSTILE, make, scores


def readings(store: Store, before: list[float], after: list[float]) -> list[str]:
    return [validation_row(scores(store, before), scores(store, after)).reading]


def test_a_difference_is_read_by_its_paired_error(store: Store) -> None:
    base = [10.0, 30.0, 20.0, 40.0]
    nearly = [4.9, 5.0, 5.1, 5.0]
    smaller, greater = ([nll + sign * by for nll, by in zip(base, nearly, strict=True)] for sign in (-1, 1))
    assert readings(store, base, smaller) == ["better"], "smaller in every row"
    assert readings(store, base, greater) == ["worse"], "greater in every row"
    assert readings(store, base, [5.0, 36.0, 14.0, 43.0]) == ["within_error"], "better in some and worse in others"
    assert readings(store, base, base) == ["within_error"], "equal"
    assert readings(store, base, [nll - 5 for nll in base]) == ["unknown_error"], "by the same in every row"


@pytest.mark.parametrize(("rows", "reading"), [(4, "within_error"), (40, "better")])
def test_few_rows_need_a_larger_difference(store: Store, rows: int, reading: str) -> None:
    """Two and a half standard errors less, with any number of rows."""
    spread = math.sqrt(rows - 1) / 2.5
    after = [9 + spread * (-1) ** index for index in range(rows)]
    row = validation_row(scores(store, [10.0] * rows), scores(store, after))
    assert row.difference / row.stderr == pytest.approx(-2.5)
    assert row.reading == reading


def test_validation_losses_and_their_difference_are_those_of_the_rows(store: Store) -> None:
    row = validation_row(scores(store, [10.0, 30.0]), scores(store, [8.0, 20.0]))
    assert (row.base, row.tuned) == (2.0, 1.4)
    assert row.difference == pytest.approx(-0.6)
    # Two rows of equal length: the standard error of the mean of their differences, -0.2 and -1.0 a token.
    assert row.stderr == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("before", "after", "reading"), [(0.0, 0.8, "better"), (0.8, 0.5, "worse"), (0.50, 0.55, "within_error")]
)
def test_lm_eval_scores_are_compared_with_both_errors(store: Store, before: float, after: float, reading: str) -> None:
    metrics = [
        json.loads((scores(store, None, v).path / "scores.json").read_text())["lm_eval"] for v in (before, after)
    ]
    (row,) = lm_eval_rows(*metrics)
    assert row.reading == reading
    assert row.stderr == pytest.approx(math.sqrt((before * (1 - before) + after * (1 - after)) / 100))


@pytest.mark.parametrize(("stderr", "number"), [(None, 100), (0.0, 1), (0.1, 1), (0.0, 2), (1e-17, 9)])
def test_a_metric_without_an_error_decides_nothing(stderr: float | None, number: int) -> None:
    before, after = (
        {"task": {"score": {"value": value, "stderr": stderr, "n": number, "higher_is_better": True}}}
        for value in (0.0, 1.0)
    )
    (row,) = lm_eval_rows(before, after)
    assert row.reading == "unknown_error"
    assert verdict([row])["text"].startswith("Too little was held out to say whether the tuned model is better.")


@pytest.mark.parametrize(("before", "after", "reading"), [(0.0, 1.0, "better"), (1.0, 0.0, "worse")])
def test_what_all_of_many_documents_do_is_a_difference(before: float, after: float, reading: str) -> None:
    (row,) = lm_eval_rows(*(
        {"task": {"score": {"value": value, "stderr": 0.0, "n": 10, "higher_is_better": True}}}
        for value in (before, after)
    ))  # fmt: skip
    assert row.reading == reading


def test_what_is_not_a_number_or_has_no_direction_decides_nothing(store: Store) -> None:
    def metric(value: float | None, better: bool | None) -> dict[str, Any]:
        return {"task": {"score": {"value": value, "stderr": 0.01, "n": 100, "higher_is_better": better}}}

    rows = [*lm_eval_rows(metric(0.5, True), metric(None, True)), *lm_eval_rows(metric(0.1, None), metric(0.9, None))]
    assert [row.reading for row in rows] == ["not_a_number", "different"]
    sentence = verdict(rows)
    assert sentence["tone"] == ""
    assert "task: score 0.5000 → — (—, not a number)" in sentence["text"].replace(" ± 0.0141", "")


def test_lower_is_better_where_the_metric_says_so() -> None:
    def metric(value: float) -> dict[str, Any]:
        return {"task": {"ter": {"value": value, "stderr": 0.01, "n": 100, "higher_is_better": False}}}

    (row,) = lm_eval_rows(metric(0.5), metric(0.3))
    assert row.reading == "better"


@pytest.mark.parametrize(
    ("nll", "exact", "tone", "opening"),
    [
        ([1.0, 11.1], 0.9, "better", "The tuned model is better than the base model on held-out data."),
        ([50.0, 60.1], 0.1, "worse", "The tuned model is worse than the base model on held-out data."),
        ([1.0, 11.1], 0.1, "worse", "The tuned model is better in some held-out measures and worse in others."),
        ([10.0, 20.0], 0.5, "", "No difference between tuned and base model exceeds its error."),
    ],
)
def test_the_verdict_says_what_the_table_says(
    store: Store, nll: list[float], exact: float, tone: str, opening: str
) -> None:
    data, html = report(store, scores(store, [10.0, 20.0], 0.5), scores(store, nll, exact))
    assert data["verdict"]["tone"] == tone
    assert data["verdict"]["text"].startswith(opening)
    assert f'<section class="verdict {tone}">{opening}' in html
    assert f"perplexity {math.exp(1.5):.4f} → " in html


def test_the_report_says_which_version_of_the_project_has_written_it(store: Store) -> None:
    data, html = report(store, scores(store, None), scores(store, None))
    assert dict(data["provenance"])["llama3-grit"] == version("llama3-grit")
    assert "llama3-grit" in html


def test_each_row_has_a_key_beside_its_words(store: Store) -> None:
    data, html = report(store, scores(store, [10.0, 20.0], 0.5), scores(store, [9.0, 18.0], 0.6))
    rows = {row["key"]: row["name"] for row in data["comparison"]}
    assert rows == {
        "validation_loss": "Validation loss, nats per token (2 rows)",
        "lm_eval:extraction:exact_match": "extraction: exact_match",
    }
    assert all(name in html for name in rows.values())


def test_words_change_no_reading(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = scores(store, [10.0, 20.0], 0.5), scores(store, [1.0, 11.1], 0.9)
    data, _ = report(store, before, after)
    monkeypatch.setattr(ScoreDifference, "label", property(lambda row: f"Verlust von {row.key}"))
    renamed, html = report(store, before, after)
    assert "Verlust von validation_loss" in html
    assert renamed["verdict"]["tone"] == data["verdict"]["tone"] == "better"


def test_nothing_held_out_is_said(store: Store) -> None:
    data, html = report(store, scores(store, None), scores(store, None))
    assert data["verdict"]["text"] == "Nothing was measured on held-out data, so nothing can be said."
    assert data["comparison"] == []
    assert data["verdict"]["text"] in html


def test_texts_from_outside_stay_texts(store: Store) -> None:
    data, html = report(store, scores(store, [10.0, 20.0]), scores(store, [9.0, 18.0], answer=HOSTILE))

    class Tags(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.tags: set[str] = set()
            self.text = ""

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            self.tags.add(tag)

        def handle_data(self, data: str) -> None:
            self.text += data

    page = Tags()
    page.feed(html)
    assert "script" not in page.tags
    assert page.text.count(HOSTILE) == 6, "data example, prompt, tuned answer, the GGUF's answer, and two checks"
    assert data["samples"][0]["tuned"] == HOSTILE


def test_a_sample_is_exact_only_if_it_is(store: Store) -> None:
    data, html = report(store, scores(store, [10.0]), scores(store, [9.0], answer=" yes\n"))
    assert [data["samples"][0][f"{role}_exact"] for role in ("base", "tuned")] == [False, True]
    assert html.count("exact match</span>") == 1


def report(
    store: Store,
    base: Artifact,
    tuned: Artifact,
    promoted: bool = True,
    merge: dict[str, Any] | None = None,
    validation: Sequence[tuple[int, float]] = (),
) -> tuple[dict[str, Any], str]:
    """The report of a run whose other stages made the least that they can make; trained on NF4 if `merge` is given."""
    overrides = {"method": "baseline", "model": {"quantization": "nf4" if merge else "none"}}
    merge = merge or {"into": "original"}
    step = {"step": 1, "loss": 2.0, "grad_norm": 1.0, "seconds": 1.0, "tokens": 10, "supervised_tokens": 5}
    none = {"train": 0, "validation": 0, "test": 0}
    card = {
        "rows": none, "tokens": none, "supervised_tokens": none, "truncated": none,
        "left_out": {name: {} for name in none}, "turns_left_out": {name: {"x": 1} for name in none},
        "supervised_share": 0.5, "example": HOSTILE,
        "histogram": {"edges": [1, 2], "counts": [1]},
    }  # fmt: skip
    history = {
        "method": "baseline", "steps": 1, "final_loss": 2.0, "final_loss_steps": 1, "median_seconds_per_step": 1.0,
        "total_seconds": 1.0, "basis_seconds": 30.0, "kept": None if validation else [1, 1.25], "stopped_early": True,
        "tokens": 10, "supervised_tokens": 5, "validation": validation, "trainable_parameters": 3,
        "peak_memory_bytes": 10**9, "peak_memory_kind": "resident set", "device": "CPU",
    }  # fmt: skip
    gguf = {"type": "q8_0", "bytes": 5, "answer": {"prompt": "Q", "text": HOSTILE, "tokens_per_second": 1.0}}
    check = {"name": "token ids", "value": HOSTILE, "limit": "all equal", "reading": "failed"}
    fidelity = {"passed": False, "rows": 1, "tokens": 2, "checks": [check]}
    artifact = write_report.function(
        load_settings("demo", overrides),
        model=make(store, "model", {"name": "m"}),
        dataset=make(store, "dataset", {}, card=card),
        history=make(store, "history", history, history=step),
        base=base,
        tuned=tuned,
        merged=make(store, "merged", {"merge": merge}),
        gguf=make(store, "gguf", gguf),
        fidelity=make(store, "fidelity", fidelity),
        registration=make(store, "registration", {"name": "it", "model": "it:1", "target": "server", "needs": None}),
        promotion=make(
            store, "promotion", {"promoted": promoted, "in_use": "x" if promoted else None, "checks": [check]}
        ),
        store=store,
    )
    return json.loads((artifact.path / "report.json").read_text()), Path(artifact.path / "report.html").read_text()


@pytest.mark.parametrize("promoted", [True, False])
def test_it_is_said_which_model_is_in_use(store: Store, promoted: bool) -> None:
    data, html = report(store, scores(store, [10.0, 20.0]), scores(store, [9.0, 18.0]), promoted)
    assert "of step 1, with the lowest validation loss (1.2500)" in html and "stopped early" in html
    assert ("Not promoted</span>: nothing is in use as <code>it</code>" in html) == (not promoted)
    assert data["next"] == [f"ollama run {'it' if promoted else 'it:1'}"]


@pytest.mark.parametrize(
    ("trained", "share", "sentence"),
    [
        (1.30, 0.25, '1.3000; merged, and rounded to the base\'s dtype, it is 1.3500: <span class="bad">25% of what'),
        (1.345, 1 / 31, "1.3450; merged, and rounded to the base's dtype, it is 1.3500.</p>"),
        (1.6, None, None),
    ],
)
def test_what_merging_takes_is_told(store: Store, trained: float, share: float | None, sentence: str | None) -> None:
    points = [(0, 1.5), (1, trained)]
    data, html = report(store, scores(store, [10.0, 20.0]), scores(store, [9.0, 18.0]), validation=points)
    assert (data["merging_cost"] or {}).get("lost") == (share and pytest.approx(share))
    assert sentence is None or sentence in html
    assert ("As trained" in html) == (sentence is not None)


def test_both_merges_of_an_nf4_training_are_told(store: Store) -> None:
    before, after = scores(store, [10.0]), scores(store, [9.0])
    losses = {"dequantized": 0.5, "original": 0.75}
    measured = {"into": "dequantized", "validation_loss": losses, "difference": 0.25, "stderr": 0.125}
    data, html = report(store, before, after, merge=measured)
    assert data["merge"] == measured
    sentence = (
        "Trained on NF4. Merged into the dequantised weights that training saw its validation loss is 0.5000, merged "
        "into the original 16-bit weights 0.7500 (difference -0.2500 ± 0.1250); the first ships."
    )
    assert sentence in html
    swapped = {"into": "original", "validation_loss": {"dequantized": 1.0, "original": 0.75}, "difference": -0.25}
    assert "(difference -0.2500)" in report(store, before, after, merge=swapped | {"stderr": None})[1]
    alone = report(store, before, after, merge={"into": "original"})[1]
    assert "merged into the original 16-bit weights; the other merge was not tried" in alone
    assert "NF4. Merged" not in report(store, before, after)[1]


def test_without_grit_there_is_no_picture_of_its_factors(store: Store) -> None:
    _, html = report(store, scores(store, [10.0]), scores(store, [9.0]))
    assert html.count("<svg") == 3 and "GRIT's factors" not in html


@pytest.mark.parametrize(("rows", "tone"), [(19, ""), (20, "better")])
def test_few_rows_are_no_reason_for_praise(store: Store, rows: int, tone: str) -> None:
    after = [5 + 0.1 * (-1) ** index for index in range(rows)]
    sentence = verdict([validation_row(scores(store, [10.0] * rows), scores(store, after))])
    assert sentence["tone"] == tone
    assert ("But 19 rows or documents are few" in sentence["text"]) == (rows == 19)
