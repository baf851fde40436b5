"""Rows become conversations: lists of {"role", "content"}, ending with the assistant."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from tasks.chat.rendering import Messages
from tasks.data.merge_template import fitting_template
from tasks.data.shapes import SHAPES, Fields, Row, Shape
from tasks.engine.errors import UserError
from tasks.settings.finetune import DataSettings


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
    placed = [(row, f"{where}, row {number}") for number, row in enumerate(rows, start=1)]
    columns = sorted({name for row, _ in placed[:100] for name in row})
    if settings.merge_template is not None:
        template = fitting_template(settings, columns, where)
        chats = [template.turns(row, place) for row, place in placed]
    else:
        shape = _fitting_shape(settings, columns, where)
        chats = [shape.turns(Fields(row, settings.columns, place)) for row, place in placed]
    turns_left_out = Counter[str]()
    conversations = [_answered(messages, turns_left_out) for messages in chats]
    for messages, (_, place) in zip(conversations, placed, strict=True):
        _check_encodable(messages, place)
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


def _fitting_shape(settings: DataSettings, columns: list[str], where: object) -> Shape:
    """The shape that the settings name, or the first one of which all required columns are there."""
    roles = sorted({role for shape in SHAPES.values() for role in (*shape.required, *shape.optional)})
    names = {role: settings.columns.get(role, role) for role in roles}
    if unknown := sorted(set(settings.columns) - set(names)):
        raise UserError(
            f"unknown role {', '.join(unknown)}", where="data.columns", fix=f"The roles are {', '.join(roles)}."
        )
    if absent := sorted(set(settings.columns.values()) - set(columns)):
        raise UserError(
            f"no column {', '.join(absent)}; the columns are {', '.join(columns)}",
            where=where,
            fix="Correct data.columns.",
        )
    shapes = list(SHAPES.values()) if settings.shape == "auto" else [SHAPES[settings.shape]]
    for shape in shapes:
        if all(names[role] in columns for role in shape.required):
            return shape
    wanted = " or ".join("+".join(names[role] for role in shape.required) for shape in shapes)
    raise UserError(
        f"the columns are {', '.join(columns)}; needed are {wanted}",
        where=where,
        fix="Map them, e.g. --data.columns instruction=question --data.columns output=answer.",
    )


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
