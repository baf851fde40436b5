"""Conversations become token ids and labels: only the assistant's tokens and their end-of-turn token are supervised."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tqdm import tqdm

from tasks.chat.formats import format_names
from tasks.chat.rendering import Messages, render
from tasks.engine.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNSUPERVISED = -100
"""Label of a token that does not enter the loss, PyTorch's `ignore_index`."""
BATCH = 1000


@dataclass(frozen=True)
class Tokens:
    """One conversation."""

    input_ids: list[int]
    """Token ids, without padding."""
    labels: list[int]
    """The same where supervised, -100 elsewhere."""

    @property
    def supervised(self) -> int:
        """Number of supervised tokens that a model is asked for; the first token has no predecessor."""
        return sum(label != UNSUPERVISED for label in self.labels[1:])

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens before the last answer."""
        last = max((index for index, label in enumerate(self.labels) if label != UNSUPERVISED), default=-1)
        while last >= 0 and self.labels[last] != UNSUPERVISED:
            last -= 1
        return last + 1

    def cut(self, length: int) -> Tokens:
        """The first `length` tokens."""
        return Tokens(self.input_ids[:length], self.labels[:length])


def tokenize(tokenizer: PreTrainedTokenizerBase, conversations: list[Messages], name: str) -> Iterator[Tokens]:
    """Tokenise conversations as they are rendered by the tokenizer's chat template.

    Each assistant turn is tokenised by itself, as generation would produce it: the tokens before it are exactly those
    of the prompt that generation gets. An assistant turn before the first user turn is context, not supervised.

    Args:
        tokenizer: with the chosen chat format; its eos token ends a turn.
        conversations: each ends with the assistant.
        name: label of the progress bar.

    Raises:
        UserError: the template rewrites earlier turns, so that a prompt is no prefix of its conversation; or the
            tokenizer puts a space before each piece, so that pieces cannot be put together.
    """
    alone, after = (tokenizer(text, add_special_tokens=False).input_ids for text in ("a", "\na"))
    if alone != after[-1:]:
        raise UserError(
            "the tokenizer treats the beginning of a text specially (SentencePiece), which is not supported",
            where="model.name",
            fix="Choose a model with a byte-level tokenizer, such as Llama 3 or SmolLM2.",
        )
    with tqdm(total=len(conversations), desc=f"Tokenising {name}", unit="row") as bar:
        for start in range(0, len(conversations), BATCH):
            batch = [_segments(tokenizer, messages) for messages in conversations[start : start + BATCH]]
            texts = [text for segments in batch for text, _ in segments]
            ids = iter(tokenizer(texts, add_special_tokens=False).input_ids)
            for segments in batch:
                input_ids: list[int] = []
                labels: list[int] = []
                for _, supervised in segments:
                    piece = next(ids)
                    input_ids += piece
                    labels += piece if supervised else [UNSUPERVISED] * len(piece)
                yield Tokens(input_ids, labels)
            bar.update(len(batch))


def _segments(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[tuple[str, bool]]:
    """Split a rendered conversation into pieces that are supervised and pieces that are not."""
    full, end = render(tokenizer, messages), 0
    segments: list[tuple[str, bool]] = []
    asked = False
    for index, message in enumerate(messages):
        asked = asked or message["role"] == "user"
        if message["role"] != "assistant" or not asked:  # a greeting answers nothing
            continue
        prompt = render(tokenizer, messages[:index], prompt=True)
        until = render(tokenizer, messages[: index + 1])
        if not (full.startswith(prompt) and full.startswith(until.rstrip())):
            raise UserError(
                "the tokenizer's chat template rewrites earlier turns, so its prompts are no prefixes",
                where="chat.format",
                fix=f"Choose {format_names('or')}.",
            )
        stop = until.rindex(str(tokenizer.eos_token)) + len(str(tokenizer.eos_token))
        segments += [(full[end : len(prompt)], False), (full[len(prompt) : stop], True)]
        end = stop
    return [segment for segment in segments if segment[0]]
