"""The second data set: nothing that is trained on counts, and the rows are drawn."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.comparison.measure_second_data import measure_second_data, second_settings, without_trained
from tasks.engine.artifacts import Artifact, Store
from tasks.engine.errors import UserError
from tasks.settings.finetune import DataSettings, ModelSettings, ScoringSettings

BASE = ModelSettings(name="tiny", dtype="float32")


def row(*turns: tuple[list[int], list[int]]) -> dict[str, list[int]]:
    """Tokens of prompts and answers in turn."""
    return {
        "input_ids": [token for prompt, answer in turns for token in (*prompt, *answer)],
        "labels": [token for prompt, answer in turns for token in (*[-100] * len(prompt), *answer)],
    }


def test_rows_whose_prompt_is_trained_on_are_left_out() -> None:
    trained = [row(([1, 2], [3])), row(([1, 5], [6]), ([7], [8]))]
    other_answer = row(([1, 2], [4]))
    later_turn_too = row(([1, 2], [3]), ([9], [9]))
    first_turn_of_two = row(([1, 5], [9]))
    begins_alike = row(([1, 5], [6]), ([9], [8]))
    longer = row(([1, 2, 3], [4]))
    rows = [other_answer, later_turn_too, first_turn_of_two, begins_alike, longer]
    assert without_trained(rows, trained) == [begins_alike, longer]


@pytest.fixture(scope="module")
def trained(tokenized_rows: Callable[[int, int], Artifact]) -> Artifact:
    return tokenized_rows(6, 0)


def second(store: Store, like: Artifact, rows: list[Any]) -> Artifact:
    with store.draft("dataset") as draft:
        for path in (like.path / "tokenizer").iterdir():
            target = draft.path / "tokenizer" / path.name
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
        pq.write_table(pa.Table.from_pylist(rows), draft.path / "train.parquet")
        draft.facts = {"max_length": 64, "end_of_turn": "<|im_end|>"}
    return draft.done()


def test_the_rows_that_are_left_are_drawn_by_the_seed(
    tiny_model: Artifact, trained: Artifact, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    own = pq.read_table(trained.path / "train.parquet").to_pylist()
    others = [row(([20 + n], [30] * (n + 1))) for n in range(12)]
    data = second(store, trained, [*own, *others])

    asked: Any = {"trained": trained, "settings": ScoringSettings(), "base": BASE, "number": 4, "store": store}

    def measured(seed: int) -> Artifact:
        return measure_second_data.function(tiny_model, second=data, seed=seed, **asked)

    def tokens(losses: Artifact) -> list[int]:
        counts: list[int] = json.loads((losses.path / "rows.json").read_text())["supervised_tokens"]
        return counts

    losses = measured(1)
    assert (losses.facts["rows"], losses.facts["left_out"]) == (4, 6)
    assert "6 of 18 rows of the second data set are left out" in caplog.text
    assert tokens(losses) == sorted(tokens(losses)) != [1, 2, 3, 4], "not the first"
    assert tokens(measured(1)) == tokens(losses) != tokens(measured(2))
    nothing_new = second(store, trained, own)
    with pytest.raises(UserError, match="second_data: the methods are trained on every prompt of it"):
        measure_second_data.function(tiny_model, second=nothing_new, seed=1, **asked)


def test_the_same_file_by_another_path_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "link.jsonl").symlink_to("rows.jsonl")
    monkeypatch.chdir(tmp_path)
    first = DataSettings(source=str(tmp_path / "rows.jsonl"))
    for name in ("rows.jsonl", "./rows.jsonl", "link.jsonl", str(tmp_path / "rows.jsonl")):
        with pytest.raises(UserError, match="second_data: this is what the methods are trained on"):
            second_settings(first, name)
    with pytest.raises(UserError):
        second_settings(DataSettings(source="owner/name"), "owner/name")
    assert second_settings(first, "owner/name").max_rows is None
