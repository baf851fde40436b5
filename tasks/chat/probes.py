"""Conversations at which renderings of chat templates are known to differ. None ends with the assistant's turn."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from tasks.chat.capabilities import QUESTION, TOOL, WEATHER, knows_thinking, knows_tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Probe:
    """A conversation that is to be answered."""

    name: str
    """What is hard about it."""
    messages: list[dict[str, Any]]
    tools: tuple[dict[str, Any], ...] = ()
    thinking: bool | None = None
    """None: nothing is said about it."""

    @property
    def alternates(self) -> bool:
        """No role speaks twice in a row; Ollama's own templates join such turns."""
        return all(first["role"] != second["role"] for first, second in pairwise(self.messages))

    @property
    def begins_with_system(self) -> bool:
        """Ollama puts no system prompt of its own before it."""
        return self.messages[0]["role"] == "system"


def _turns(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


CONTROL_TOKENS = (
    "<|im_start|>user\n", "<|im_end|>", "<|start_header_id|>", "<|eot_id|>", "<|begin_of_text|>", "<|endoftext|>",
    "<s>", "</s>", "[INST]", "### Instruction:\n", "### Response:",
)  # fmt: skip
SYNTAX = (
    "{{ bos_token }}", "{% if x %}", "{# no comment #}", "{{ .System }}", "{{ range .Messages }}", "[[ end_of_turn ]]",
    "{{", "}}", '"""', "'", "\\n", "\\", "%s", "$1", "<b>&amp;</b>",
)  # fmt: skip


def _both(name: str, system: str, *turns: tuple[str, str]) -> tuple[Probe, Probe]:
    """With a system prompt and without, since some templates refuse one."""
    with_system = Probe(f"{name}, with a system prompt", _turns(("system", system), *turns))
    return Probe(name, _turns(*turns)), with_system


def _hard(name: str, texts: tuple[str, ...]) -> tuple[Probe, Probe]:
    turns = (("user", "".join(texts)), ("assistant", "a".join(texts)), ("user", "\n".join(texts)))
    return _both(name, " ".join(texts), *turns)


PLAIN = (
    *_both("a question", "Be brief.", ("user", "Hello")),
    *_both(
        "several exchanges",
        "Be brief.",
        *(("user", "Hello"), ("assistant", "Hi"), ("user", "How are you?"), ("assistant", "Well.\n\nAnd you?")),
        ("user", "Grüße aus Köln, 日本語 😀"),
    ),
    *_both(
        "white space at both ends",
        " \n Be brief.\t\n",
        *(("user", "\n\n  Hello  "), ("assistant", " \tHi\n\n"), ("user", "\r\n Bye \n")),
    ),
    *_both("empty turns", "", ("user", ""), ("assistant", ""), ("user", "")),
    *_both("turns of white space", "\n", ("user", " "), ("assistant", "\n"), ("user", "\n\n")),
    *_hard("control tokens in the text", CONTROL_TOKENS),
    *_hard("template syntax in the text", SYNTAX),
    Probe("two questions in a row", _turns(("user", "Hello"), ("user", "Are you there?"))),
    Probe(
        "two answers in a row", _turns(("user", "Hello"), ("assistant", "Hi"), ("assistant", "there"), ("user", "Bye"))
    ),
    Probe(
        "a system turn after the first exchange",
        _turns(("user", "Hello"), ("assistant", "Hi"), ("system", "Be brief."), ("user", "Bye")),
    ),
)
"""Without tools, and nothing said about thinking: what every template is asked."""

_CALL: dict[str, Any] = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "a1b2c3d4e",
            "type": "function",
            "function": {"name": WEATHER, "arguments": {"place": 'Köln "Süd" <1>', "unit": "celsius", "days": 2}},
        }
    ],
}
_ANSWER: dict[str, Any] = {
    "role": "tool",
    "name": WEATHER,
    "tool_call_id": "a1b2c3d4e",
    "content": '{"degrees": 21.5, "sky": "<clear> & dry"}',
}
_SECOND_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "Tells the time.",
        "parameters": {"type": "object", "required": ["zone"], "properties": {"zone": {"type": "string"}}},
    },
}

WITH_TOOLS = (
    Probe("a tool is offered", QUESTION, (TOOL,)),
    Probe("two tools and a system prompt", [*_turns(("system", "Be brief.")), *QUESTION], (TOOL, _SECOND_TOOL)),
    Probe("a tool was called and has answered", [*QUESTION, _CALL, _ANSWER], (TOOL,)),
    Probe(
        "a question after a tool's answer",
        [*QUESTION, _CALL, _ANSWER, *_turns(("assistant", "21.5 degrees."), ("user", "And tomorrow?"))],
        (TOOL,),
    ),
)
"""For templates that know tools."""

_EXCHANGES = PLAIN[2].messages
WITH_THINKING = (
    Probe("thinking asked for", QUESTION, thinking=True),
    Probe("thinking not asked for", QUESTION, thinking=False),
    Probe("thinking asked for after several exchanges", _EXCHANGES, thinking=True),
    Probe("thinking not asked for after several exchanges", _EXCHANGES, thinking=False),
)
"""For templates that know thinking; the plain conversations leave it unsaid."""


def probes(tokenizer: PreTrainedTokenizerBase) -> tuple[Probe, ...]:
    """The conversations that a tokenizer's template can be asked, by what it knows.

    Args:
        tokenizer: with the chat template.
    """
    tools, thinking = knows_tools(tokenizer), knows_thinking(tokenizer)
    both = (Probe("a tool's answer, thinking not asked for", WITH_TOOLS[2].messages, (TOOL,), thinking=False),)
    return (
        *PLAIN,
        *(WITH_TOOLS if tools else ()),
        *(WITH_THINKING if thinking else ()),
        *(both if tools and thinking else ()),
    )
