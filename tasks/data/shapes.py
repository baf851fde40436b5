"""Shapes of rows: by which columns each is known, and how a row of it becomes turns of {"role", "content"}."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tasks.chat.rendering import Messages
from tasks.engine.errors import UserError

Row = Mapping[str, Any]

SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}


@dataclass(frozen=True)
class Fields:
    """A row, read by the roles of its columns."""

    row: Row
    columns: Mapping[str, str]
    """Role to column; a role without an entry is the name of its column."""
    where: str
    """The row, for error messages."""

    def value(self, role: str) -> Any:
        """What the role's column holds; None where the row has no such column."""
        return self.row.get(self._column(role))

    def text(self, role: str) -> str:
        """The same as text, empty for None.

        Raises:
            UserError: it is no text.
        """
        return as_text(self.value(role), self.place(role))

    def place(self, role: str) -> str:
        """Row and column, for error messages."""
        return f"{self.where}, column {self._column(role)}"

    def _column(self, role: str) -> str:
        return self.columns.get(role, role)


@dataclass(frozen=True)
class Shape:
    """How a row holds its conversation."""

    required: tuple[str, ...]
    """Roles of the columns by which the shape is known."""
    turns: Callable[[Fields], Messages]
    """What a row says, in order. Empty turns and those without an answer may be among them."""
    optional: tuple[str, ...] = ()
    """Roles of further columns."""


def question_and_answer(question: str, answer: str) -> Messages:
    """The turns of a user and an assistant."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def as_text(value: Any, where: str) -> str:
    """A value that must be a text; None counts as empty.

    Args:
        value: of a row.
        where: row and column, for the error.

    Raises:
        UserError: it is no text.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise wrong_type(value, "text", where)
    return value


def wrong_type(value: Any, wanted: str, where: str) -> UserError:
    """What to raise where a row holds a value of another type.

    Args:
        value: of the row.
        wanted: the type, in words.
        where: row and column.
    """
    return UserError(
        f"{wanted} is needed, found {type(value).__name__} {value!r:.60}", where=where, fix="Correct the row."
    )


def _messages(fields: Fields) -> Messages:
    return _chat(fields.value("messages"), fields.place("messages"))


def _sharegpt(fields: Fields) -> Messages:
    return _chat(fields.value("conversations"), fields.place("conversations"))


def _alpaca(fields: Fields) -> Messages:
    instruction, context, output = (fields.text(role) for role in ("instruction", "input", "output"))
    return question_and_answer(f"{instruction}\n\n{context}" if context.strip() else instruction, output)


def _prompt_completion(fields: Fields) -> Messages:
    prompt, completion = (fields.text(role) for role in ("prompt", "completion"))
    return question_and_answer(prompt, completion)


def _chat(turns: Any, where: str) -> Messages:
    """A list of turns, each with a role or `from`, and content or `value`."""
    if turns is None:
        return []
    if not isinstance(turns, list):
        raise wrong_type(turns, "a list of turns", where)
    messages = []
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise wrong_type(turn, "an object with role and content", where)
        speaker = turn.get("role", turn.get("from"))
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise UserError(f"unknown role {speaker!r}", where=where, fix=f"Use one of {', '.join(sorted(SPEAKERS))}.")
        content = as_text(turn.get("content", turn.get("value")), where)
        messages.append({"role": SPEAKERS[speaker], "content": content})
    return messages


SHAPES: dict[str, Shape] = {
    "messages": Shape(("messages",), _messages),
    "sharegpt": Shape(("conversations",), _sharegpt),
    "alpaca": Shape(("instruction", "output"), _alpaca, optional=("input",)),
    "prompt_completion": Shape(("prompt", "completion"), _prompt_completion),
}
"""By the name that the setting `data.shape` has for it, in the order in which `auto` tries them."""
