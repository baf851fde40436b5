"""The copy of a chat template that goes into tokenizer and GGUF: it renders alike everywhere and on every day."""

from __future__ import annotations

import re
from collections.abc import Callable
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
_CALL = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?(["'])(.*?)\1\s*\)""")


def prepare_templates(tokenizer: PreTrainedTokenizerBase) -> None:
    """Replace a tokenizer's template by its copy, or each one of several. A copy is left as it is.

    Args:
        tokenizer: with a chat template; changed.
    """
    _change(tokenizer, lambda template: _mended(tokenizer, template))
    if not _is_chatml(tokenizer):  # which a server recognises rightly
        _change(tokenizer, lambda template: template if RULE in template else RULE + template)


def pinned_date(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The date that stands for the date of the day in the copy of a template; None: the template has none.

    Args:
        tokenizer: with the copy.
    """
    templates = tokenizer.chat_template
    texts = [templates] if isinstance(templates, str) else list((templates or {}).values())
    return f"{DAY:%d %b %Y}" if any(DATE_NOTE in text for text in texts) else None


def _change(tokenizer: PreTrainedTokenizerBase, change: Callable[[str], str]) -> None:
    """Change the template, or each one of several that have names."""
    templates = tokenizer.chat_template
    several = isinstance(templates, dict)
    tokenizer.chat_template = {name: change(text) for name, text in templates.items()} if several else change(templates)


def _is_chatml(tokenizer: PreTrainedTokenizerBase) -> bool:
    return known_format(tokenizer) == "chatml" and not (knows_tools(tokenizer) or knows_thinking(tokenizer))


def _mended(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """With a constant date, and a list of no tools where nothing else would do."""
    template = _with_constant_date(template)
    if not _renders(tokenizer, template, tools=None) and _renders(tokenizer, template, tools=[]):
        return NO_TOOLS + template
    return template


def _with_constant_date(template: str) -> str:
    constant = _CALL.sub(lambda call: f"{call[1]}{DAY.strftime(call[2])}{call[1]}", template)
    given = "".join(
        f'{{% set {name} = "{DAY.strftime(GIVEN_DATES[name])}" %}}\n' for name in sorted(_undeclared(template))
    )
    return template if constant == template and not given else DATE_NOTE + given + constant


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
