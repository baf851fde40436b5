"""One prompt made of many columns, by a template."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from tasks.chat.rendering import Messages
from tasks.data.shapes import Row, question_and_answer, wrong_type
from tasks.engine.errors import UserError
from tasks.settings.finetune import DataSettings

FIELD = re.compile(r"\{([^{}\n]+)\}")
"""A `{column}` of a template."""
OPTIONAL_OR_FIELD = re.compile(r"\[\[(.*?)\]\]|\{([^{}\n]+)\}", re.DOTALL)
"""A part in double brackets, or a `{column}` outside of one."""


@dataclass(frozen=True)
class MergeTemplate:
    """A template that fits the rows."""

    text: str
    fields: frozenset[str]
    """Columns in it."""
    answer: str
    """Column of the answer."""

    def turns(self, row: Row, where: str) -> Messages:
        """Question and answer of a row; nothing where all fields of the question are empty.

        Args:
            row: with the columns of the template.
            where: the row, for error messages.

        Raises:
            UserError: a value is a list or an object.
        """
        for name in {*self.fields, self.answer}:
            if isinstance(row.get(name), list | dict):
                raise wrong_type(row[name], "text", f"{where}, column {name}")
        if not any(_plain(row.get(name)).strip() for name in self.fields):
            return []
        return question_and_answer(merge_columns(self.text, row), _plain(row.get(self.answer)))


def fitting_template(settings: DataSettings, columns: list[str], where: object) -> MergeTemplate:
    """The merge template of the settings, checked against the columns that there are.

    Args:
        settings: template, and the answer's column.
        columns: of the rows.
        where: the file, for error messages.

    Raises:
        UserError: no column in the template, one that is not there, or a map of other columns than the answer's.
    """
    template = settings.merge_template or ""
    if unknown := sorted(set(settings.columns) - {"completion"}):
        raise UserError(
            f"unknown role {', '.join(unknown)}",
            where="data.columns",
            fix="With data.merge_template the one role is completion, the column of the answer.",
        )
    answer = settings.columns.get("completion", "output")
    fields = frozenset(FIELD.findall(template))
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
    return MergeTemplate(template, fields, answer)


def merge_columns(template: str, row: Row) -> str:
    """Fill `{column}` in a template; a part in [[double brackets]] vanishes when a field in it is empty.

    Args:
        template: e.g. `{question}[[ (context: {context})]]`.
        row: the values; None counts as empty.
    """

    def filled(part: re.Match[str]) -> str:
        optional, column = part.groups()
        if optional is None:
            return _plain(row.get(column))
        if not all(_plain(row.get(name)).strip() for name in FIELD.findall(optional)):
            return ""
        return FIELD.sub(lambda field: _plain(row.get(field[1])), optional)

    # In one pass, so that brackets and braces inside the values stay as they are.
    return OPTIONAL_OR_FIELD.sub(filled, template)


def _plain(value: Any) -> str:
    return "" if value is None else str(value)
