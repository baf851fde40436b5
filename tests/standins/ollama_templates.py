"""The STAND-IN's templates: what a GGUF's own is taken for, and who formats a model's chats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

NEAR = 100
"""A template counts as a reference that is fewer edits away than this."""
BARE = "{{ .Prompt }}"
"""What a server shows where there is no template at all."""
BARE_MESSAGES = '{{ range .Messages }}{{ if ne .Role "system" }}{{ .Content }}{{ end }}{{ end }}'
"""What an old server makes of it."""


class Reference(NamedTuple):
    """A template that the server knows, and what it takes in its place."""

    jinja: str
    go: str
    stops: list[str]


REFERENCES = {
    "chatml": Reference(
        jinja=(
            "{% for message in messages %}"
            r"{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
            "{% endfor %}"
            r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
        ),
        go=("{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"),
        stops=["<|im_start|>", "<|im_end|>"],
    ),
    "gemma-instruct": Reference(
        jinja=(
            "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
            "{{ raise_exception('System role not supported') }}{% endif %}"
            "{% for message in messages %}"
            "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
            "{{ raise_exception('Roles must alternate') }}{% endif %}"
            "{% if message['role'] == 'assistant' %}{% set role = 'model' %}"
            "{% else %}{% set role = message['role'] %}{% endif %}"
            r"{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
            "{% endfor %}"
            r"{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
        ),
        go=(
            '{{ range .Messages }}<start_of_turn>{{ if eq .Role "assistant" }}model{{ else }}user{{ end }}\n'
            "{{ .Content }}<end_of_turn>\n{{ end }}<start_of_turn>model\n"
        ),
        stops=["<start_of_turn>", "<end_of_turn>"],
    ),
}
"""Two of the 37 that a server has, in words of our own. Neither knows tools or thinking."""


def distance(a: str, b: str) -> int:
    """How many code points must be put in, taken out or replaced to make one text of another."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def detected(jinja: str | None) -> str | None:
    """The name of the reference that a template is taken for, if any."""
    lengths = {name: len(reference.jinja) for name, reference in REFERENCES.items()}
    near = [name for name, length in lengths.items() if jinja and abs(length - len(jinja)) < NEAR]
    edits = {name: distance(jinja or "", REFERENCES[name].jinja) for name in near}
    nearest = min(edits, key=edits.__getitem__, default=None)
    return nearest if nearest is not None and edits[nearest] < NEAR else None


@dataclass(frozen=True)
class Formatter:
    """Who formats a model's chats."""

    engine: Literal["go", "jinja"]
    template: str
    """As `show` returns it."""
    capabilities: frozenset[str]
    """Of `tools` and `thinking`."""


def formatter(jinja: str | None, go: str | None, *, knows_jinja: bool) -> Formatter:
    """Who formats: the TEMPLATE layer if there is one, unless the GGUF's own template can more.

    Args:
        jinja: the GGUF's.
        go: the TEMPLATE layer.
        knows_jinja: whether the server renders a GGUF's template at all.
    """
    own, layered = abilities_of_jinja(jinja or ""), abilities_of_go(go or "")
    if not knows_jinja or (go and not own > layered):
        return Formatter("go", go or BARE, layered)
    return Formatter("jinja", jinja or BARE, own)


def abilities_of_jinja(text: str) -> frozenset[str]:
    """What a server takes a Jinja template to know, by its words."""
    splits = any(f"content.split({quote}</think>{quote})" in text for quote in "'\"")
    elsewhere = "reasoning_content" in text or "<SPECIAL_12>" in text
    thinks = ("<think>" in text and "</think>" in text) or (splits and not elsewhere)
    tools = "tools" in text or "tool_call" in text
    return frozenset([*["tools"] * tools, *["thinking"] * thinks])


def abilities_of_go(text: str) -> frozenset[str]:
    """What a server takes a TEMPLATE layer to know, by its fields."""
    fields = {"tools": ".Tools", "thinking": ".Thinking"}
    return frozenset(name for name, field in fields.items() if field in text)
