"""Rows of any known shape become conversations: lists of {"role", "content"}, ending with the assistant."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tasks.engine.errors import UserError
from tasks.settings.finetune import DataSettings

Messages = list[dict[str, str]]
Row = Mapping[str, Any]

FIELD = re.compile(r"\{([^{}\n]+)\}")
"""A `{column}` of a merge template."""
REQUIRED = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
}
"""Columns by which a shape is known, in the order in which they are tried."""
OPTIONAL = {"alpaca": ("input",)}
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}


@dataclass
class Conversations:
    """What rows became."""

    kept: list[Messages]
    empty: int
    """Rows left out because prompt or answer is empty."""
    turns_left_out: Counter[str]
    """Turns left out of rows that were kept, by reason."""


def to_conversations(rows: Iterable[Row], settings: DataSettings, where: object) -> Conversations:
    """Turn rows into conversations.

    Args:
        rows: at least one.
        settings: shape, column map, merge template.
        where: the file, for error messages.

    Raises:
        UserError: the columns fit no shape, a value has the wrong type, or all rows are empty.
    """
    rows, turns_left_out = list(rows), Counter[str]()
    columns = sorted({name for row in rows[:100] for name in row})
    if settings.merge_template is not None:
        convert = _merging(settings, columns, where)
    else:
        shape = _shape(settings, columns, where)
        convert = _shaped(shape, settings.columns, turns_left_out)
    conversations = [convert(row, f"{where}, row {number}") for number, row in enumerate(rows, start=1)]
    for number, messages in enumerate(conversations, start=1):
        _check_encodable(messages, f"{where}, row {number}")
    kept = [messages for messages in conversations if messages]
    if not kept:
        raise UserError("every row is empty", where=where, fix="Check that the columns hold the data you mean.")
    return Conversations(kept, len(conversations) - len(kept), turns_left_out)


def join_rows(conversations: list[Messages], count: int, seed: int) -> tuple[list[Messages], int]:
    """Join `count` conversations at a time, in an order shuffled by the seed, into multi-turn ones.

    Args:
        conversations: of one split, so that nothing crosses between splits.
        count: conversations to join; the last one may hold fewer.
        seed: rules the order.

    Returns:
        The joined conversations, and how many system prompts were left out because the first of theirs says otherwise.
    """
    if count == 1:
        return conversations, 0
    order = list(range(len(conversations)))
    random.Random(seed).shuffle(order)  # noqa: S311, no secret
    joined, other_systems = [], 0
    for start in range(0, len(order), count):
        messages = [message for index in order[start : start + count] for message in conversations[index]]
        first, rest = messages[:1], messages[1:]
        other_systems += sum(message["role"] == "system" and message != first[0] for message in rest)
        joined.append(first + [message for message in rest if message["role"] != "system"])
    return joined, other_systems


def merge_columns(template: str, row: Row) -> str:
    """Fill `{column}` in a template; a part in [[double brackets]] vanishes when a field in it is empty.

    Args:
        template: e.g. `{question}[[ (context: {context})]]`.
        row: the values; None counts as empty.
    """

    def fill(part: str) -> str:
        return FIELD.sub(lambda found: _plain(row.get(found[1])), part)

    def optional(found: re.Match[str]) -> str:
        fields = FIELD.findall(found[1])
        return fill(found[1]) if all(_plain(row.get(name)).strip() for name in fields) else ""

    # Both in one pass, so that brackets and braces inside the values stay as they are.
    return re.sub(
        r"\[\[(.*?)\]\]|\{([^{}\n]+)\}",
        lambda found: optional(found) if found[1] is not None else _plain(row.get(found[2])),
        template,
        flags=re.DOTALL,
    )


def _shape(settings: DataSettings, columns: list[str], where: object) -> str:
    names = {role: settings.columns.get(role, role) for role in _roles()}
    if unknown := sorted(set(settings.columns) - set(names)):
        raise UserError(
            f"unknown role {', '.join(unknown)}", where="data.columns", fix=f"The roles are {', '.join(sorted(names))}."
        )
    if absent := sorted(set(settings.columns.values()) - set(columns)):
        raise UserError(
            f"no column {', '.join(absent)}; the columns are {', '.join(columns)}",
            where=where,
            fix="Correct data.columns.",
        )
    shapes = REQUIRED if settings.shape == "auto" else {settings.shape: REQUIRED[settings.shape]}
    for shape, roles in shapes.items():
        if all(names[role] in columns for role in roles):
            return shape
    wanted = " or ".join("+".join(names[role] for role in roles) for roles in shapes.values())
    raise UserError(
        f"the columns are {', '.join(columns)}; needed are {wanted}",
        where=where,
        fix="Map them, e.g. --data.columns instruction=question --data.columns output=answer.",
    )


def _shaped(shape: str, columns: Mapping[str, str], turns_left_out: Counter[str]) -> Any:
    def column(role: str) -> str:
        return columns.get(role, role)

    def chat(row: Row, where: str) -> Messages:
        turns = row.get(column(REQUIRED[shape][0]))
        if turns is None:
            return []
        where = f"{where}, column {column(REQUIRED[shape][0])}"
        if not isinstance(turns, list):
            raise _wrong_type(turns, "a list of turns", where)
        messages = []
        for turn in turns:
            if not isinstance(turn, Mapping):
                raise _wrong_type(turn, "an object with role and content", where)
            speaker = turn.get("role", turn.get("from"))
            if not isinstance(speaker, str) or speaker not in SPEAKERS:
                raise UserError(
                    f"unknown role {speaker!r}", where=where, fix=f"Use one of {', '.join(sorted(SPEAKERS))}."
                )
            content = _text(turn.get("content", turn.get("value")), where)
            messages.append({"role": SPEAKERS[speaker], "content": content})
        return _answered(messages, turns_left_out)

    def alpaca(row: Row, where: str) -> Messages:
        instruction, given, output = (
            _text(row.get(column(role)), f"{where}, column {column(role)}")
            for role in ("instruction", "input", "output")
        )
        return _pair(f"{instruction}\n\n{given}" if given.strip() else instruction, output)

    def pair(row: Row, where: str) -> Messages:
        prompt, completion = (
            _text(row.get(column(role)), f"{where}, column {column(role)}") for role in ("prompt", "completion")
        )
        return _pair(prompt, completion)

    return {"messages": chat, "sharegpt": chat, "alpaca": alpaca, "prompt_completion": pair}[shape]


def _merging(settings: DataSettings, columns: list[str], where: object) -> Any:
    template = settings.merge_template or ""
    if unknown := sorted(set(settings.columns) - {"completion"}):
        raise UserError(
            f"unknown role {', '.join(unknown)}",
            where="data.columns",
            fix="With data.merge_template the one role is completion, the column of the answer.",
        )
    answer = settings.columns.get("completion", "output")
    fields = set(FIELD.findall(template))
    if not fields:
        raise UserError(
            "no {column} in the template", where="data.merge_template", fix=f"The columns are {', '.join(columns)}."
        )
    if missing := sorted((fields | {answer}) - set(columns)):
        raise UserError(
            f"no column {', '.join(missing)}; the columns are {', '.join(columns)}",
            where=where,
            fix="Correct data.merge_template, or name the answer's column with data.columns.completion.",
        )

    def convert(row: Row, where: str) -> Messages:
        for name in {*fields, answer}:
            if isinstance(row.get(name), list | dict):
                raise _wrong_type(row[name], "text", f"{where}, column {name}")
        if not any(_plain(row.get(name)).strip() for name in fields):
            return []
        return _pair(merge_columns(template, row), _plain(row.get(answer)))

    return convert


def _answered(messages: Messages, turns_left_out: Counter[str]) -> Messages:
    """Cut a chat before its first empty turn and after its last answer; nothing where no question was answered."""
    whole = len(messages)
    empty = (i for i, message in enumerate(messages) if message["role"] != "system" and not message["content"].strip())
    messages = messages[: next(empty, whole)]
    cut = whole - len(messages)
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()  # a question without an answer teaches nothing
    first = next((index for index, message in enumerate(messages) if message["role"] == "user"), whole)
    if not any(message["role"] == "assistant" for message in messages[first:]):
        return []
    turns_left_out["from an empty turn on"] += cut
    turns_left_out["without an answer"] += whole - cut - len(messages)
    return messages


def _check_encodable(messages: Messages, where: str) -> None:
    try:
        "".join(message["content"] for message in messages).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.start + 1]
        raise UserError(
            f"half of a character ({half!a}) that UTF-8 cannot write", where=where, fix="Correct the row."
        ) from None


def _roles() -> list[str]:
    return sorted({role for roles in (*REQUIRED.values(), *OPTIONAL.values()) for role in roles})


def _pair(prompt: str, completion: str) -> Messages:
    if not prompt.strip() or not completion.strip():
        return []
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


def _text(value: Any, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _wrong_type(value, "text", where)
    return value


def _plain(value: Any) -> str:
    return "" if value is None else str(value)


def _wrong_type(value: Any, wanted: str, where: str) -> UserError:
    return UserError(
        f"{wanted} is needed, found {type(value).__name__} {value!r:.60}", where=where, fix="Correct the row."
    )
