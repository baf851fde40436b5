"""Which of our formats a tokenizer's own template renders like, and which system prompt it puts in by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.chat.formats import FORMATS, ChatTemplate
from tasks.chat.probes import PLAIN, Probe
from tasks.chat.rendering import render, without_bos
from tasks.engine.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def known_format(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Which of our formats the tokenizer's template renders like, the beginning-of-text token aside.

    All plain conversations are compared but those where a role speaks twice in a row, which Ollama joins. One without
    a system prompt gets the template's own, as Ollama puts it there.

    Args:
        tokenizer: with the chat template.
    """
    system = default_system(tokenizer)
    asked = [probe for probe in PLAIN if probe.alternates]
    for name, template in FORMATS.items():
        if all(_renders_like(tokenizer, template, probe, system) for probe in asked):
            return name
    return None


def _renders_like(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, probe: Probe, system: str | None) -> bool:
    try:
        text = without_bos(tokenizer, render(tokenizer, probe.messages, prompt=True))
    except UserError:  # a template without a system role is none of ours
        return False
    before = [] if system is None or probe.begins_with_system else [{"role": "system", "content": system}]
    ours = tokenizer.apply_chat_template(
        [*before, *probe.messages], chat_template=template.jinja, tokenize=False, add_generation_prompt=True
    )
    return text == ours


def default_system(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The system prompt that the template puts before a conversation without one, if it does.

    Args:
        tokenizer: with the chat template.
    """
    user = {"role": "user", "content": "U1"}
    try:
        before, system, after = render(tokenizer, [{"role": "system", "content": "S1"}, user]).partition("S1")
    except UserError:  # no system role at all
        return None
    if not system:
        return None
    bare = render(tokenizer, [user])
    if not (bare.startswith(before) and bare.endswith(after)):
        return None
    return bare[len(before) : len(bare) - len(after)].strip() or None


def own_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template writes by itself around the turns of a conversation, in pieces that a zero byte parts.

    Args:
        tokenizer: with the chat template. Special tokens are left out.
    """
    turns = [{"role": role, "content": "\0"} for role in ("system", "user", "assistant", "user")]
    try:
        text = render(tokenizer, turns, prompt=True)
    except UserError:  # no system role
        text = render(tokenizer, turns[1:], prompt=True)
    for token in tokenizer.added_tokens_decoder.values():
        text = text.replace(str(token), "\0")
    return text
