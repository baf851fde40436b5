"""The copy of a chat template that goes into tokenizer and GGUF: it renders alike everywhere and on every day."""

from __future__ import annotations

import re
from datetime import datetime
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, TemplateSyntaxError, meta

from tasks.chat.capabilities import QUESTION, knows_thinking, knows_tools
from tasks.chat.recognition import known_format
from tasks.chat.rendering import THINKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RULE = "{# " + 120 * "\u2500" + " #}\n"
"""Begins a template, so that Ollama's server takes it for none of those that it knows.

The server compares texts by the edits between them, and takes what is less than 100 away. No template that it knows
holds this character. The newline after a comment or a block is no part of what is rendered; it keeps the next line the
beginning of a line, where white space before a block is none either.
"""
DAY = datetime(2024, 7, 26)
"""What Llama 3.1's own template takes for the date of the day where it is given none."""
DATE_NOTE = f"{{# The date of the day is always {DAY:%d %b %Y} here. #}}\n"
GIVEN_DATES = {"date_string": "%d %b %Y", "datetime": "%b %d %Y"}
"""Variables that llama.cpp's server gives to each template, and how it writes the date of the day into them."""
NO_TOOLS = "{% if not tools %}{% set tools = [] %}{% endif %}\n"
"""Before a template that goes through its tools without asking whether there are any."""
_CALL = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?(["'])((?:(?!\1).)*)\1\s*\)""")


_REMAINING_CALL = re.compile(r"\bstrftime_now\s*\(")
_DIRECTIVES = ("%-d", "%-m", "%-H", "%-I", "%-M", *(f"%{letter}" for letter in "aAbBcdeDfFHIjmMpSTxXyYzZ"))
CONSTANT_DATE = (
    # Naming `varargs` and `kwargs` lets the macro be called with anything, such as a time zone.
    "{% macro strftime_now(format) %}{% if varargs or kwargs %}{% endif %}{{ format"
    + "".join(f" | replace('{directive}', '{DAY.strftime(directive)}')" for directive in _DIRECTIVES)
    + " }}{% endmacro %}\n"
)
"""Stands in for the function where a call's format is no literal."""


def keep_one_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Keep one of several templates with names: `default`, or the first one where none has that name.

    Args:
        tokenizer: changed, so that training, tokenizer and GGUF have the same template.

    Returns:
        Its name, where there was a choice.
    """
    templates = tokenizer.chat_template
    if not isinstance(templates, dict):
        return None
    name: str = "default" if "default" in templates else next(iter(templates))
    tokenizer.chat_template = templates[name]
    return name if len(templates) > 1 else None


def prepare_templates(tokenizer: PreTrainedTokenizerBase) -> None:
    """Replace a tokenizer's template by its copy. A copy is left as it is.

    Args:
        tokenizer: with a chat template; changed.
    """
    tokenizer.chat_template = _mended(tokenizer, str(tokenizer.chat_template))
    if not _is_chatml(tokenizer) and RULE not in tokenizer.chat_template:  # which a server recognises rightly
        tokenizer.chat_template = RULE + tokenizer.chat_template


def pinned_date(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The date that stands for the date of the day in the copy of a template; None: the template has none.

    Args:
        tokenizer: with the copy.
    """
    return f"{DAY:%d %b %Y}" if DATE_NOTE in str(tokenizer.chat_template) else None


def _is_chatml(tokenizer: PreTrainedTokenizerBase) -> bool:
    return known_format(tokenizer) == "chatml" and not (knows_tools(tokenizer) or knows_thinking(tokenizer))


def _mended(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """With a constant date, and a list of no tools where nothing else would do."""
    template = _with_constant_date(template)
    if not _renders(tokenizer, template, tools=None) and _renders(tokenizer, template, tools=[]):
        return NO_TOOLS + template
    return template


def _with_constant_date(template: str) -> str:
    if DATE_NOTE in template:  # a copy
        return template
    constant = _CALL.sub(lambda call: f"{call[1]}{DAY.strftime(call[2])}{call[1]}", template)
    given = "".join(
        f'{{% set {name} = "{DAY.strftime(GIVEN_DATES[name])}" %}}\n' for name in sorted(_undeclared(template))
    )
    macro = CONSTANT_DATE if _REMAINING_CALL.search(constant) else ""
    return template if constant == template and not (given or macro) else DATE_NOTE + given + macro + constant


def _undeclared(template: str) -> set[str]:
    """Which of the dates the template reads and does not set first."""
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])  # noqa: S701 - nothing is rendered
    text = re.sub(r"{%-?\s*(?:end)?generation\s*-?%}", "", template)  # a tag of Transformers alone
    try:
        return meta.find_undeclared_variables(environment.parse(text)) & GIVEN_DATES.keys()
    except TemplateSyntaxError:  # who renders it says so
        return set()


def _renders(tokenizer: PreTrainedTokenizerBase, template: str, *, tools: list[Any] | None) -> bool:
    try:
        tokenizer.apply_chat_template(QUESTION, chat_template=template, tools=tools, tokenize=False, **THINKING)
    except Exception:  # a template may fail in any way
        return False
    return True
