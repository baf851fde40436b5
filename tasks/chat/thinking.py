"""Blocks of thinking: what opens one, what ends it, and an answer without it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINKING_BLOCKS = {
    "<think>": "\n</think>\n\n",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "Here are my reasoning steps:": "\n[BEGIN FINAL RESPONSE]\n",
}
"""What opens a block of thinking at the end of a prompt, and what ends an empty one where the template does not."""


def end_of_thinking(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What ends a block of thinking, of a model whose chat template writes such blocks.

    Args:
        tokenizer: with the chat template.
    """
    template = str(tokenizer.chat_template)
    return next((ending.strip() for opening, ending in THINKING_BLOCKS.items() if opening in template), None)


def without_thinking(answer: str, ending: str | None) -> str:
    """What a model says after it has thought, as a server passes it on; all of it where no block ends.

    Args:
        answer: as the model wrote it.
        ending: from `end_of_thinking`.
    """
    _, ended, rest = answer.rpartition(ending) if ending else ("", "", "")
    return rest.lstrip() if ended else answer
