"""Conversations as text, rendered by the tokenizer's chat template in the way that llama.cpp's server does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tasks.chat.formats import format_names
from tasks.engine.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]
THINKING: dict[str, Any] = {"enable_thinking": True}
"""What a template gets where nothing is said about thinking: what llama.cpp's server passes."""


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool | None = None,
) -> str:
    """The text of a conversation.

    Args:
        tokenizer: with the chat template.
        messages: the conversation.
        prompt: it ends where the assistant's answer begins.
        tools: what the model may call; the template gets none where this is None or empty.
        thinking: whether the model is asked to think; None: as where nothing is said.

    Raises:
        UserError: the template refuses the conversation, such as one with a system prompt.
    """
    options = THINKING if thinking is None else THINKING | {"enable_thinking": thinking}
    if tools:
        options = options | {"tools": [dict(tool) for tool in tools]}
    conversation = [dict(message) for message in messages]
    try:
        return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=prompt, **options))
    except Exception as error:  # a template may fail in any way
        raise UserError(
            f"the chat template refuses a conversation: {error}",
            where="chat.format",
            fix=f"Choose {format_names('or')}, or remove the system prompts.",
        ) from None


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself puts a beginning-of-text token before a text."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id


def without_bos(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A rendered text as a server's template renders it: without the token that llama.cpp itself puts before it.

    Args:
        tokenizer: with the chat template.
        text: what `render` returned.
    """
    return text.removeprefix(str(tokenizer.bos_token)) if adds_bos(tokenizer) else text
