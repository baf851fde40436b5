from __future__ import annotations

import json
from dataclasses import fields
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tasks.data.demo_extraction import ROWS, compose, generate, pools
from tasks.settings.presets import PRESETS, load_settings

PARTS = tuple(ROWS)
KEYS = ["intent", "name", "item", "quantity", "date"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    directory = tmp_path_factory.mktemp("extraction")
    generate(directory, seed=3407)
    assert sorted(path.name for path in directory.iterdir()) == sorted(f"{part}.jsonl" for part in PARTS)
    return {part: [json.loads(line) for line in (directory / f"{part}.jsonl").open()] for part in PARTS}


def answers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [json.loads(row["messages"][1]["content"]) for row in rows]


def test_rows_are_one_question_and_one_line_of_compact_json(data: dict[str, list[dict[str, Any]]]) -> None:
    for part, rows in data.items():
        assert len(rows) == ROWS[part] == len({row["messages"][0]["content"] for row in rows})
        for row in rows:
            assert list(row) == ["messages"]
            question, answer = row["messages"]
            assert (question["role"], answer["role"]) == ("user", "assistant")
            assert not set(question["content"]) & set("[]{}")
            values = json.loads(answer["content"])
            assert list(values) == KEYS
            assert answer["content"] == json.dumps(values, separators=(",", ":"))


def test_everything_asked_for_stands_in_the_message(data: dict[str, list[dict[str, Any]]]) -> None:
    for rows in data.values():
        for row, values in zip(rows, answers(rows), strict=True):
            message = row["messages"][0]["content"]
            assert values["name"] in message
            assert values["item"] in message
            if values["date"] is not None:
                day, month = values["date"].split()
                assert day in message
                assert month in message


def test_no_text_or_value_stands_in_two_parts() -> None:
    parts = pools(3407)
    for pool, other in combinations(parts.values(), 2):
        for field in fields(pool):
            assert not set(getattr(pool, field.name)) & set(getattr(other, field.name)), field.name
        names = set(pool.first_names) | set(pool.last_names)
        assert not names & (set(other.first_names) | set(other.last_names))


def test_no_name_item_or_date_of_the_test_occurs_in_training(data: dict[str, list[dict[str, Any]]]) -> None:
    seen = answers(data["train"])
    for part in ("validation", "test"):
        for key in ("name", "item", "date"):
            new = {values[key] for values in answers(data[part])} - {None}
            assert len(new) > 10
            assert not new & {values[key] for values in seen}, (part, key)


def test_the_data_are_varied(data: dict[str, list[dict[str, Any]]]) -> None:
    parts = pools(3407)
    for part, least in zip(PARTS, (25, 8, 8), strict=True):
        assert len(parts[part].templates) >= least
    for part, rows in data.items():
        values = answers(rows)
        intents = [value["intent"] for value in values]
        assert {"order", "return", "repair", "cancel"} == set(intents)
        assert max(intents.count(intent) for intent in set(intents)) < 0.5 * len(intents)
        assert 0.05 < sum(value["date"] is None for value in values) / len(values) < 0.5
        assert {1, 12} < {value["quantity"] for value in values} or part != "train"


def test_each_template_says_what_it_promises() -> None:
    random = Random(0)  # noqa: S311, no secret
    for pool in pools(1).values():
        for intent, text in pool.templates:
            assert {"{goods}", "{date}"} <= {f"{{{part.split('}')[0]}}}" for part in text.split("{")[1:]}
            assert text.count("[") == text.count("]") > 0
            assert intent in ("order", "return", "repair", "cancel")
        message, values = compose(pool, random)
        assert str(values["name"]) in message


def test_the_seed_rules_everything(tmp_path: Path) -> None:
    written = []
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        generate(tmp_path / name, seed)
        written.append({part: (tmp_path / name / f"{part}.jsonl").read_bytes() for part in PARTS})
    assert written[0] == written[1]
    assert all(written[0][part] != written[2][part] for part in PARTS)


def test_rows_fit_the_demo_preset(
    data: dict[str, list[dict[str, Any]]], smollm2_tokenizer: PreTrainedTokenizerFast
) -> None:
    settings = load_settings("demo")
    lengths = []
    for row in data["train"] + data["test"]:
        messages = [{"role": "system", "content": settings.chat.system}, *row["messages"]]
        lengths.append(
            len(smollm2_tokenizer(smollm2_tokenizer.apply_chat_template(messages, tokenize=False)).input_ids)
        )
    assert max(lengths) <= settings.data.max_length
    assert sum(lengths) / len(lengths) < 105
    longest = max(len(smollm2_tokenizer(row["messages"][1]["content"]).input_ids) for row in data["test"])
    assert longest < settings.scoring.max_new_tokens
    assert "max_gen_toks: 64" in (PRESETS / "lm_eval" / "extraction.yaml").read_text()
