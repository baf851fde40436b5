from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.data.conversations import join_rows, to_conversations
from tasks.data.merge_template import merge_columns
from tasks.data.shapes import SHAPES, Fields, Shape, question_and_answer
from tasks.engine.artifacts import Artifact, Store
from tasks.engine.errors import UserError
from tasks.fetch_data import fetch_data
from tasks.prepare_dataset import prepare_dataset
from tasks.settings.finetune import ChatSettings, DataSettings, DataShape

USER, ASSISTANT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


def convert(*rows: dict[str, Any], **settings: Any) -> tuple[list[list[dict[str, str]]], int]:
    conversations = to_conversations(rows, DataSettings(**settings), "rows.json")
    return conversations.kept, conversations.empty


def test_each_shape_has_a_name_in_the_settings() -> None:
    assert set(SHAPES) == set(get_args(DataShape)) - {"auto"}


@pytest.mark.parametrize("shape", ["q_and_a", "auto"])
def test_a_shape_is_one_row_of_the_table(
    tiny_model: Artifact, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str
) -> None:
    def turns(fields: Fields) -> list[dict[str, str]]:
        return question_and_answer(fields.text("q"), fields.text("a"))

    monkeypatch.setitem(SHAPES, "q_and_a", Shape(("q", "a"), turns))
    path = tmp_path / "rows.jsonl"
    rows = [{"asked": f"Question {number}", "a": f"Answer {number}"} for number in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"asked": "", "a": "A"}]))
    settings = DataSettings(source=str(path), columns={"q": "asked"}, max_length=64, validation_fraction=0.25)
    settings = settings.model_copy(update={"shape": shape})
    source = fetch_data.function(settings, 1, store=store)
    dataset = prepare_dataset.function(source, tiny_model, settings, ChatSettings(format="chatml"), 1, store=store)
    assert dataset.facts["rows"] == {"train": 3, "validation": 1, "test": 0}
    (held_out,) = (dataset.path / "validation.jsonl").read_text().splitlines()
    prompt = json.loads(held_out)["prompt"]
    assert json.loads(held_out)["completion"] == prompt.replace("Question", "Answer")
    assert json.loads((dataset.path / "card.json").read_text())["left_out"]["train"] == {"empty": 1}
    with pytest.raises(UserError, match=r"needed are .*q\+a"):
        to_conversations(rows, settings.model_copy(update={"columns": {}}), path)


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Q", "output": "A"},
        {"instruction": "Q", "input": "", "output": "A", "text": "ignored"},
        {"prompt": "Q", "completion": "A"},
        {"messages": [USER, ASSISTANT]},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}, {"from": "user"}]},
    ],
)  # fmt: skip
def test_shapes_are_detected(row: dict[str, Any]) -> None:
    assert convert(row) == ([[USER, ASSISTANT]], 0)


def test_alpaca_input_follows_the_instruction() -> None:
    ((messages,), _) = convert({"instruction": "Add", "input": "1 2", "output": "3"})
    assert messages[0]["content"] == "Add\n\n1 2"


def test_columns_and_shape_can_be_named() -> None:
    row = {"question": "Q", "answer": "A", "messages": "something else"}
    columns = {"instruction": "question", "output": "answer"}
    assert convert(row, shape="alpaca", columns=columns) == ([[USER, ASSISTANT]], 0)


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"a": 1}], {}, "the columns are a; needed are messages or conversations or instruction+output"),
        ([{"prompt": "Q", "completion": "A"}], {"shape": "alpaca"}, "needed are instruction+output"),
        ([{"prompt": "Q", "completion": "A"}], {"columns": {"qestion": "x"}}, "data.columns: unknown role qestion"),
        ([{"prompt": "Q", "completion": "A"}], {"columns": {"input": "contxt"}}, "no column contxt; the columns are"),
        ([{"messages": [{"role": ["x"], "content": "y"}]}], {}, "unknown role ['x']"),
        ([{"messages": [ASSISTANT, ASSISTANT]}], {}, "every row is empty"),
        ([{"prompt": "", "completion": "A"}] * 3, {}, "rows.json: every row is empty"),
        ([{"prompt": "Q", "completion": "A"}, {"prompt": [1], "completion": "A"}], {}, "row 2, column prompt: text"),
        ([{"messages": "hello"}], {}, "row 1, column messages: a list of turns is needed, found str"),
        ([{"messages": ["hello"]}], {}, "row 1, column messages: an object with role and content is needed"),
        ([{"messages": [{"role": "wizard", "content": "x"}]}], {}, "row 1, column messages: unknown role 'wizard'"),
        ([{"messages": [{"role": "user", "content": 3}]}], {}, "row 1, column messages: text is needed, found int"),
        ([{"a": "x", "output": "A"}], {"merge_template": "no field"}, "data.merge_template: no {column}"),
        ([{"a": "x", "output": "A"}], {"merge_template": "{b}"}, "no column b; the columns are a, output"),
        ([{"a": "", "output": "A"}], {"merge_template": "Question: {a}"}, "every row is empty"),
        ([{"a": "x", "output": "A"}], {"merge_template": "{a}", "columns": {"output": "a"}}, "unknown role output"),
        ([{"a": ["x"], "output": "A"}], {"merge_template": "{a}"}, "row 1, column a: text is needed, found list"),
    ],
)  # fmt: skip
def test_bad_rows_are_one_clear_line(rows: list[dict[str, Any]], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        convert(*rows, **settings)
    assert message in str(caught.value)


def test_empty_rows_are_counted() -> None:
    good = {"prompt": "Q", "completion": "A"}
    assert convert(good, {"prompt": None, "completion": "A"}, {"prompt": "Q", "completion": " "}) == (
        [[USER, ASSISTANT]],
        2,
    )


def test_many_columns_become_one_prompt() -> None:
    template = "{question}[[\nContext: {context}]][[\nPages {first} to {last}.]]"
    rows = [
        {"question": "Who?", "context": "Rome", "first": 3, "last": 4, "output": "Caesar"},
        {"question": "Who?", "context": "", "first": 3, "last": None, "output": "Caesar"},
    ]
    conversations, _ = convert(*rows, merge_template=template)
    assert [messages[0]["content"] for messages in conversations] == [
        "Who?\nContext: Rome\nPages 3 to 4.",
        "Who?",
    ]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from("abc"), st.none() | st.text(alphabet=string.printable)))
def test_values_are_never_read_as_template(row: dict[str, str | None]) -> None:
    texts = {name: row.get(name) or "" for name in "abc"}
    optional = f" ({texts['b']}, {texts['c']})" if texts["b"].strip() and texts["c"].strip() else ""
    assert merge_columns("<{a}>[[ ({b}, {c})]]", row) == f"<{texts['a']}>{optional}"


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 30), st.integers(2, 5), st.integers(0, 5))
def test_joining_keeps_every_turn_once(rows: int, count: int, seed: int) -> None:
    roles_of_all = ("system", "S"), ("user", "Q"), ("assistant", "A")
    conversations = [[{"role": role, "content": f"{text}{i}"} for role, text in roles_of_all] for i in range(rows)]
    joined, _ = join_rows(conversations, count, seed)
    assert joined == join_rows(conversations, count, seed)[0]
    assert len(joined) == -(-rows // count)
    contents = [message["content"] for messages in joined for message in messages if message["role"] != "system"]
    assert sorted(contents) == sorted(f"{letter}{i}" for i in range(rows) for letter in "QA")
    for messages in joined:
        roles = [message["role"] for message in messages]
        assert roles == ["system"] + ["user", "assistant"] * ((len(roles) - 1) // 2)
