"""Conversations become token ids and labels: only the assistant's tokens and their end-of-turn token are supervised."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from os.path import commonprefix
from typing import TYPE_CHECKING

from tqdm import tqdm

from tasks.chat.formats import format_names
from tasks.chat.rendering import Messages, render
from tasks.chat.thinking import THINKING_BLOCKS
from tasks.engine.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNSUPERVISED = -100
"""Label of a token that does not enter the loss, PyTorch's `ignore_index`."""
BATCH = 1000
EXCERPT = 30
"""Characters of a text that an error shows."""


@dataclass(frozen=True)
class Tokens:
    """One conversation."""

    input_ids: list[int]
    """Token ids, without padding."""
    labels: list[int]
    """The same where supervised, -100 elsewhere."""
    rewritten: int = 0
    """Number of earlier answers that are not supervised, since the template renders them otherwise later on."""

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
        return Tokens(self.input_ids[:length], self.labels[:length], self.rewritten)


def tokenize(tokenizer: PreTrainedTokenizerBase, conversations: list[Messages], name: str) -> Iterator[Tokens]:
    """Tokenise conversations as they are rendered by the tokenizer's chat template.

    Each assistant turn is tokenised by itself, as generation would produce it: the tokens before it are exactly those
    of the prompt that generation gets. An assistant turn before the first user turn is context, not supervised.

    Where the template renders an earlier answer or its prompt otherwise than it was generated, only the last answer is
    supervised. Where the prompt opens a block of thinking that the row lacks, the answer begins with the block's end.

    Args:
        tokenizer: with the chosen chat format; its eos token ends a turn.
        conversations: each ends with the assistant.
        name: label of the progress bar.

    Raises:
        UserError: the prompt of the last answer is no beginning of its conversation, or its end of turn occurs before
            it; or the tokenizer puts a space before each piece, so that pieces cannot be put together.
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
            texts = [text for segments, _ in batch for text, _ in segments]
            ids = iter(tokenizer(texts, add_special_tokens=False).input_ids)
            for segments, rewritten in batch:
                input_ids: list[int] = []
                labels: list[int] = []
                for _, supervised in segments:
                    piece = next(ids)
                    input_ids += piece
                    labels += piece if supervised else [UNSUPERVISED] * len(piece)
                yield Tokens(input_ids, labels, rewritten)
            bar.update(len(batch))


def _segments(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[list[tuple[str, bool]], int]:
    """Split a rendered conversation into pieces that are supervised or not; count answers that are rewritten later."""
    roles = [message["role"] for message in messages]
    asked = roles.index("user") if "user" in roles else len(roles)  # a greeting before it answers nothing
    answers = [index for index, role in enumerate(roles) if role == "assistant" and index > asked]
    if not answers:
        return [], 0
    end_of_turn = str(tokenizer.eos_token)
    last, full = render(tokenizer, messages[: answers[-1]], prompt=True), render(tokenizer, messages)
    said = messages[answers[-1]]["content"].strip()
    answer = _answer(last, full, said, end_of_turn)
    if answer is None:
        raise _no_beginning(last, full)
    before, content, _ = answer.partition(said or end_of_turn)
    if content and end_of_turn in before:
        raise UserError(
            f"the chat template puts {end_of_turn} before an answer too, where the model would stop",
            where="chat.format",
            fix=f"Choose {format_names('or')}.",
        )
    row, end = last + answer, 0
    segments: list[tuple[str, bool]] = []
    for index in answers[:-1]:
        prompt = render(tokenizer, messages[:index], prompt=True)
        until = render(tokenizer, messages[: index + 1])
        earlier = _answer(prompt, until, messages[index]["content"].strip(), end_of_turn)
        if earlier is None or not row.startswith(prompt + earlier):
            return [(last, False), (answer, True)], len(answers) - 1
        segments += [(row[end : len(prompt)], False), (earlier, True)]
        end = len(prompt + earlier)
    segments += [(last[end:], False), (answer, True)]
    return [segment for segment in segments if segment[0]], 0


def _answer(prompt: str, row: str, said: str, end_of_turn: str) -> str | None:
    """What the model is to generate after a prompt, with the end of its turn; None: the row does not continue it."""
    blocks = [block for block in THINKING_BLOCKS.items() if prompt.rstrip().endswith(block[0])]
    opening, ending = blocks[0] if blocks else ("", "")
    before = prompt if row.startswith(prompt) or not opening else prompt.rpartition(opening)[0]
    if not row.startswith(before):
        return None
    rest = _ended(row[len(before) :], said, end_of_turn)
    if before != prompt and rest.startswith((opening, ending.strip())):  # the template ends the block in its own way
        rest = rest.removeprefix(opening).lstrip()
    is_ended = ending.strip() in (rest.partition(said)[0] if said else rest)
    return rest if is_ended else ending + rest


def _no_beginning(prompt: str, row: str) -> UserError:
    """The error for a prompt that its row does not continue, with the first place that differs."""
    place = len(commonprefix([prompt, row]))  # noqa: RUF071 - of texts, character by character
    before, asked, trained = row[:place][-EXCERPT:], prompt[place:][:EXCERPT], row[place:][:EXCERPT]
    return UserError(
        "the chat template renders the prompt of an answer otherwise than the row that it is part of: "
        f"after {before!r}, {asked!r} in place of {trained!r}",
        where="chat.format",
        fix=f"Choose {format_names('or')}.",
    )


def _ended(text: str, said: str, end_of_turn: str) -> str:
    """A text up to the end of turn after what is said, which is added where the template leaves it out."""
    start = text.find(said) + len(said) if said in text else 0
    end = text.rfind(end_of_turn, start)
    return (text if end < 0 else text[:end]) + end_of_turn
