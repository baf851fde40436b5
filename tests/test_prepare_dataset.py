from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tasks.chat.applying import apply_chat_format
from tasks.chat.rendering import render
from tasks.chat.templates import RULE
from tasks.data.tokenization import UNSUPERVISED, tokenize
from tasks.engine.artifacts import Artifact, Store, reference
from tasks.engine.errors import UserError
from tasks.fetch_data import fetch_data
from tasks.prepare_dataset import prepare_dataset, stop_tokens
from tasks.settings.finetune import ChatSettings, DataSettings
from tests.support.jinja_templates import LATEST_THOUGHTS, TOOLS, TRIMMING

# SmolLM2's vocabulary lacks some bytes: control characters and those with which unassigned planes of Unicode begin.
LETTERS = st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n\t", max_codepoint=0x1FFFF)
TEXT = st.text(LETTERS, min_size=1, max_size=40).filter(str.strip)


def prepare(
    model: Artifact, store: Store, path: Path, chat: ChatSettings | None = None, **changes: Any
) -> tuple[Artifact, dict[str, Any]]:
    data = DataSettings(source=str(path), **{"max_length": 64, "validation_fraction": 0.1, **changes})
    source = fetch_data.function(data, 3, store=store)
    dataset = prepare_dataset.function(source, model, data, chat or ChatSettings(format="tokenizer"), 3, store=store)
    return dataset, json.loads((dataset.path / "card.json").read_text())


def rows(dataset: Artifact, split: str) -> list[dict[str, list[int]]]:
    return pq.read_table(dataset.path / f"{split}.parquet").to_pylist()


def write(path: Path, items: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


@pytest.fixture
def model_speaking(tiny_model: Artifact, tmp_path: Path) -> Callable[[Any], Artifact]:
    """A base model whose tokenizer has a chat template, or several by name."""

    def make(template: Any) -> Artifact:
        directory = Path(shutil.copytree(tiny_model.path, tmp_path / "model"))
        tokenizer = AutoTokenizer.from_pretrained(directory)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(directory)
        return reference("model", directory, [], dict(tiny_model.facts))

    return make


@pytest.fixture(scope="module", params=["chatml", "alpaca", "tokenizer"])
def formatted(request: pytest.FixtureRequest, smollm2_tokenizer: PreTrainedTokenizerFast) -> Any:
    return apply_chat_format(smollm2_tokenizer, request.param)


@settings(max_examples=40, deadline=None)
@given(turns=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3), system=st.none() | TEXT)
def test_only_answers_and_their_end_are_supervised(
    formatted: Any, turns: list[tuple[str, str]], system: str | None
) -> None:
    tokenizer = formatted
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    (tokens,) = tokenize(tokenizer, [messages], "test")
    assert len(tokens.input_ids) == len(tokens.labels)
    supervised = [token for token in tokens.labels if token != UNSUPERVISED]
    expected = "".join(answer + str(tokenizer.eos_token) for _, answer in turns)
    assert tokenizer.decode(supervised) == expected
    prompt = tokenizer(render(tokenizer, messages[:-1], prompt=True), add_special_tokens=False).input_ids
    if len(turns) == 1:
        assert tokens.input_ids[: len(prompt)] == prompt, "the prompt's tokens are those that generation gets"
    assert render(tokenizer, messages).startswith(tokenizer.decode(tokens.input_ids))


def test_the_artifact(tiny_model: Artifact, store: Store, rows_file: Path) -> None:
    dataset, card = prepare(tiny_model, store, rows_file, test_fraction=0.05)
    assert card["rows"] == {"train": 34, "validation": 4, "test": 2}
    for split, count in card["rows"].items():
        split_rows = rows(dataset, split)
        assert len(split_rows) == count
        assert card["tokens"][split] == sum(len(row["input_ids"]) for row in split_rows)
        assert card["supervised_tokens"][split] == sum(sum(t != -100 for t in row["labels"]) for row in split_rows)
    assert sum(card["histogram"]["counts"]) == 34
    assert len(card["histogram"]["edges"]) == len(card["histogram"]["counts"]) + 1
    test = [json.loads(line) for line in (dataset.path / "test.jsonl").read_text().splitlines()]
    assert test[0]["prompt"] == test[0]["messages"][-2]["content"]
    assert AutoTokenizer.from_pretrained(dataset.path / "tokenizer").chat_template
    assert dataset.facts["end_of_turn"] == "<|im_end|>"
    assert dataset.facts["stops"] == ["<|im_end|>"]
    assert dataset.facts["ollama_template"] == "chatml"
    assert "SmolLM" in dataset.facts["system"], "the template's own default system prompt goes into the Modelfile"
    again, _ = prepare(tiny_model, store, rows_file, test_fraction=0.05)
    assert again.digest == dataset.digest


def test_the_longest_held_out_prompt_is_named(tiny_model: Artifact, store: Store, tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [chats("A very long question, " * 9, "A")])
    validation = write(tmp_path / "validation.jsonl", [chats("Q1", "A1"), chats("Q2", "A2")])
    test = write(tmp_path / "test.jsonl", [chats("Q3", "A3"), chats("Q4", "A4", "Q5", "A5"), chats("Q6", "A6")])
    chat = ChatSettings(format="chatml", system=None)
    sources = {"validation_source": str(validation), "test_source": str(test)}
    dataset, _ = prepare(tiny_model, store, train, chat, max_length=512, **sources)
    tokenizer = AutoTokenizer.from_pretrained(dataset.path / "tokenizer")
    prompt = render(tokenizer, chats("Q4", "A4", "Q5")["messages"], prompt=True)
    tokens = len(tokenizer(prompt, add_special_tokens=False).input_ids)
    assert dataset.facts["longest_prompt"] == {"split": "test", "row": 2, "tokens": tokens}
    dataset, _ = prepare(tiny_model, store, train, chat, max_length=512, validation_fraction=0.0)
    assert dataset.facts["longest_prompt"] is None, "no row is held out"


def test_earlier_answers_that_the_template_rewrites_are_counted_and_context_only(
    model_speaking: Callable[[Any], Artifact], store: Store, tmp_path: Path
) -> None:
    source = write(tmp_path / "rows.jsonl", [chats("Q", "A", "Q2", "A2", "Q3", "A3"), chats("Q4", "A4")])
    dataset, card = prepare(model_speaking(LATEST_THOUGHTS), store, source, validation_fraction=0.0, max_length=512)
    assert card["turns_left_out"]["train"] == {"earlier answers, which the chat template rewrites": 2}
    assert card["rows"]["train"] == 2
    tokenizer = AutoTokenizer.from_pretrained(dataset.path / "tokenizer")
    supervised = [[label for label in row["labels"] if label != -100] for row in rows(dataset, "train")]
    assert sorted(map(tokenizer.decode, supervised)) == [
        f"<think>\n\n</think>\n\nA{number}<|im_end|>" for number in (3, 4)
    ]
    assert "template_name" not in card


def test_the_card_names_the_template_where_there_was_a_choice(
    model_speaking: Callable[[Any], Artifact], store: Store, rows_file: Path
) -> None:
    model = model_speaking({"tool_use": TOOLS, "default": TRIMMING})
    dataset, card = prepare(model, store, rows_file)
    assert card["template_name"] == "default"
    assert AutoTokenizer.from_pretrained(dataset.path / "tokenizer").chat_template == RULE + TRIMMING
    _, card = prepare(model, store, rows_file, ChatSettings(format="chatml"))
    assert "template_name" not in card


def test_all_tokens_at_which_the_model_stops_are_told(tiny_model: Artifact, tmp_path: Path) -> None:
    tokenizer = apply_chat_format(AutoTokenizer.from_pretrained(tiny_model.path), "alpaca")
    for number, (eos_token_id, wanted) in enumerate(
        [([2, 0], ["<|im_end|>", "<|endoftext|>"]), (0, ["<|im_end|>", "<|endoftext|>"]), (None, ["<|im_end|>"])]
    ):
        directory = tmp_path / str(number)
        directory.mkdir()
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": eos_token_id}))
        assert stop_tokens(reference("model", directory, [], {}), tokenizer) == wanted
    (tmp_path / "none").mkdir()
    assert stop_tokens(reference("model", tmp_path / "none", [], {}), tokenizer) == ["<|im_end|>"]


def chats(*turns: str) -> dict[str, object]:
    """A chat of alternating turns; one beginning with `S:` has that system prompt."""
    system = [{"role": "system", "content": turns[0][2:]}] if turns[0].startswith("S:") else []
    rest = turns[bool(system) :]
    return {"messages": system + [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(rest)]}


@pytest.mark.parametrize(
    ("train", "held_out", "left_out"),
    [
        (chats("Q", "A", "Q2", "A2"), chats("Q", "B"), 1),
        (chats("Q", "A"), chats("Q", "A", "Q2", "A2"), 1),
        (chats("S:Be brief.", "Q", "A"), chats("Q", "B"), 1),
        (chats("S:Be long.", "Q", "A"), chats("Q", "B"), 0),
        (chats("Hello", "Hi", "Q", "A"), chats("Hello", "Hi", "Q2", "A2"), 0),
    ],
)
def test_a_prompt_of_the_held_out_rows_is_found_in_any_turn(
    tiny_model: Artifact, store: Store, tmp_path: Path, train: Any, held_out: Any, left_out: int
) -> None:
    files = [
        write(tmp_path / f"{name}.jsonl", rows) for name, rows in (("t", [train, chats("x", "y")]), ("v", [held_out]))
    ]
    chat = ChatSettings(format="chatml", system="Be brief.")
    _, card = prepare(tiny_model, store, files[0], chat, validation_source=str(files[1]))
    assert card["left_out"]["train"].get("prompt of a held-out row", 0) == left_out


def test_no_turn_and_no_row_is_left_out_uncounted(tiny_model: Artifact, store: Store, tmp_path: Path) -> None:
    items = [
        chats("Q", "A", "unanswered"),
        chats("Q1", "A1", "Q2", " ", "Q3", "A3"),
        chats("Q4", "A4"),
        chats("Q5", "A5"),
    ]
    _, card = prepare(tiny_model, store, write(tmp_path / "a.jsonl", items), max_rows=3, validation_fraction=0.0)
    assert card["left_out"]["train"] == {"beyond data.max_rows": 1}
    assert card["turns_left_out"]["train"] == {"without an answer": 2, "from an empty turn on": 3}
    assert card["rows"]["train"] == 3
    items = [chats("S:One.", "Q", "A"), chats("S:Two.", "Q2", "A2")]
    _, card = prepare(
        tiny_model, store, write(tmp_path / "b.jsonl", items), rows_per_conversation=2, validation_fraction=0.0
    )
    assert card["turns_left_out"]["train"] == {"another system prompt within a joined conversation": 1}


def test_splits_do_not_share_a_row(tiny_model: Artifact, store: Store, rows_file: Path) -> None:
    dataset, _ = prepare(tiny_model, store, rows_file, test_fraction=0.1)
    seen = [tuple(row["input_ids"]) for split in ("train", "validation", "test") for row in rows(dataset, split)]
    assert len(seen) == len(set(seen)) == 40


def test_duplicates_and_leaks_are_counted(tiny_model: Artifact, store: Store, tmp_path: Path) -> None:
    train = [{"prompt": f"Question {i}", "completion": f"Answer {i}"} for i in range(10)]
    held_out = [{"prompt": "Question 3", "completion": "Another answer"}] * 2
    dataset, card = prepare(
        tiny_model, store, write(tmp_path / "a.jsonl", [*train, train[0], {"prompt": "  ", "completion": "x"}]),
        validation_source=str(write(tmp_path / "b.jsonl", held_out)),
    )  # fmt: skip
    assert card["left_out"]["train"] == {"empty": 1, "duplicate": 1, "prompt of a held-out row": 1}
    assert card["left_out"]["validation"] == {"duplicate": 1}
    assert card["rows"] == {"train": 9, "validation": 1, "test": 0}
    assert not (dataset.path / "test.parquet").exists()


@pytest.mark.parametrize(("policy", "kept", "truncated"), [("truncate", 2, 1), ("drop", 1, 0)])
def test_over_long_rows(
    tiny_model: Artifact, store: Store, tmp_path: Path, policy: str, kept: int, truncated: int
) -> None:
    items = [
        {"prompt": "short", "completion": "answer"},
        {"prompt": "long answer", "completion": "word " * 100},
        {"prompt": "long question " * 100, "completion": "never seen"},
    ]
    dataset, card = prepare(
        tiny_model, store, write(tmp_path / "a.jsonl", items), over_long=policy, validation_fraction=0.0
    )
    assert card["rows"]["train"] == kept
    assert card["truncated"]["train"] == truncated
    assert sum(card["left_out"]["train"].values()) == 3 - kept
    assert max(len(row["input_ids"]) for row in rows(dataset, "train")) <= 64


def test_rows_joined_into_conversations(tiny_model: Artifact, store: Store, rows_file: Path) -> None:
    dataset, card = prepare(
        tiny_model, store, rows_file, rows_per_conversation=4, max_length=512, validation_fraction=0.0
    )
    assert card["rows"]["train"] == 10
    assert card["example"].count("The sum is") == 4
    assert card["example"].count("<|im_start|>system") == 1
    assert dataset.digest == prepare(
        tiny_model, store, rows_file, rows_per_conversation=4, max_length=512, validation_fraction=0.0
    )[0].digest  # fmt: skip


def test_a_system_prompt_of_our_own(tiny_model: Artifact, store: Store, rows_file: Path) -> None:
    dataset, card = prepare(tiny_model, store, rows_file, ChatSettings(format="chatml", system="Be brief."))
    assert card["example"].startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert dataset.facts["system"] == "Be brief."


def test_nothing_left_to_train_on(tiny_model: Artifact, store: Store, tmp_path: Path) -> None:
    items = [{"prompt": "long question " * 100, "completion": "never seen"}] * 2
    with pytest.raises(UserError, match=r"no training row is left.*1 duplicate.*1 over-long"):
        prepare(tiny_model, store, write(tmp_path / "a.jsonl", items), over_long="drop", validation_fraction=0.0)


def test_formats_that_do_not_fit_are_refused(tiny_model: Artifact, store: Store, rows_file: Path) -> None:
    with pytest.raises(UserError, match=r"chat.format: .*lacks <\|eot_id\|>.*chatml, alpaca"):
        prepare(tiny_model, store, rows_file, ChatSettings(format="llama3"))


def test_no_chat_format_to_be_found(smollm2_tokenizer: PreTrainedTokenizerFast) -> None:
    bare = apply_chat_format(smollm2_tokenizer, "tokenizer")
    bare.chat_template = None
    with pytest.raises(UserError, match=r"chat.format: the model's tokenizer has no chat template"):
        apply_chat_format(bare, "tokenizer")
    bare.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    with pytest.raises(UserError, match="would never stop"):
        apply_chat_format(bare, "tokenizer")


def test_what_ollama_is_told_is_part_of_the_digest(tiny_model: Artifact, store: Store, tmp_path: Path) -> None:
    messages = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
    source = write(tmp_path / "rows.jsonl", [{"messages": messages}, {"messages": [*messages, *messages[1:]]}])
    datasets = [
        prepare(tiny_model, store, source, ChatSettings(format="chatml", system=system), validation_fraction=0)[0]
        for system in ("Be brief.", "Be kind.")
    ]
    tables = [(dataset.path / "train.parquet").read_bytes() for dataset in datasets]
    assert tables[0] == tables[1], "every row has a system prompt of its own"
    assert [dataset.facts["system"] for dataset in datasets] == ["Be brief.", "Be kind."]
    assert datasets[0].digest != datasets[1].digest, "or the other one's registration would be taken for cached"
