"""What a chat template knows beside plain turns: tools and thinking."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from tasks.chat.rendering import render
from tasks.engine.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTION: list[dict[str, Any]] = [{"role": "user", "content": "How warm is it in Cologne?"}]
WEATHER = "weather_station_reading"
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": WEATHER,
        "description": "Reads a weather station & rounds to <1 degree.",
        "parameters": {
            "type": "object",
            "required": ["place"],
            "properties": {
                "place": {"type": "string", "description": "Where the station's is"},
                "unit": {"type": "string", "enum": ["celsius", "kelvin"]},
            },
        },
    },
}
"""A tool as Ollama's server passes it on: these keys in this order."""


def knows_tools(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template tells the model which tools it may call.

    Args:
        tokenizer: with the chat template.
    """
    try:
        return WEATHER in render(tokenizer, QUESTION, prompt=True, tools=[TOOL])
    except UserError:
        return False


def knows_thinking(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template asks the model to think or not to, as it is told.

    Args:
        tokenizer: with the chat template.
    """
    try:
        asked, not_asked = (render(tokenizer, QUESTION, prompt=True, thinking=thinking) for thinking in (True, False))
    except UserError:
        return False
    return asked != not_asked


def server_capabilities(template: str) -> frozenset[str]:
    """What Ollama's server, from 0.30 on, takes a template of a GGUF to know. It goes by words in the text.

    Args:
        template: in Jinja.

    Returns:
        Any of `tools` and `thinking`.
    """
    tools = "tools" in template or "tool_call" in template
    splits = any(f"content.split({quote}</think>{quote})" in template for quote in "'\"")
    names_reasoning = "reasoning_content" in template or "<SPECIAL_12>" in template
    thinking = ("<think>" in template and "</think>" in template) or (splits and not names_reasoning)
    return frozenset(name for name, holds in (("tools", tools), ("thinking", thinking)) if holds)


def has_unseen_tools(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template writes of tools, and Ollama's server takes it to know none.

    Args:
        tokenizer: with the chat template.
    """
    text = str(tokenizer.chat_template)
    writes_of_tools = re.search(r"\btool\b", text) is not None or knows_tools(tokenizer)
    return writes_of_tools and "tools" not in server_capabilities(text)
