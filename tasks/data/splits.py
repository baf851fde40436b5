"""Training, validation and test rows: read, deduplicated, and kept apart."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass, field

from tasks.chat.rendering import Messages
from tasks.data.conversations import to_conversations
from tasks.data.files import SPLITS, read_rows
from tasks.data.tokenization import Tokens
from tasks.engine.artifacts import Artifact
from tasks.settings.finetune import ChatSettings, DataSettings


@dataclass
class Split:
    """The conversations of one split, and what was left out on the way."""

    conversations: list[Messages]
    tokens: list[Tokens] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    """Rows by reason."""
    turns_left_out: Counter[str] = field(default_factory=Counter)
    """Turns by reason, out of rows that were kept."""
    truncated: int = 0
    """Rows that were cut and kept."""
    prompts: list[int] = field(default_factory=list)
    """Tokens before the last answer of each row, which may be more than a row that was cut has."""


def read_splits(source: Artifact, data: DataSettings, chat: ChatSettings, seed: int) -> dict[str, Split]:
    """Read, deduplicate and split the conversations.

    Args:
        source: the raw rows; its facts name the file of each split that it provides.
        data: shape and split.
        chat: the system prompt.
        seed: rules the split.

    Raises:
        UserError: rows that cannot be read.
    """
    splits = {name: Split([]) for name in SPLITS}
    given = [name for name in SPLITS if name in source.facts]
    for name in given:
        where = data.source if name == "train" else getattr(data, f"{name}_source") or data.source
        rows = read_rows(source.path / str(source.facts[name]), where)
        split = splits[name]
        if name == "train" and data.max_rows is not None:
            split.left_out["beyond data.max_rows"] = max(0, len(rows) - data.max_rows)
            rows = rows[: data.max_rows]
        conversations = to_conversations(rows, data, where)
        split.left_out["empty"], split.turns_left_out = conversations.empty, conversations.turns_left_out
        kept = conversations.kept
        if chat.system is not None:
            kept = [_with_system(messages, chat.system) for messages in kept]
        split.conversations = list({json.dumps(messages): messages for messages in kept}.values())
        split.left_out["duplicate"] = len(kept) - len(split.conversations)
    rows_of_train = splits["train"].conversations
    order = list(range(len(rows_of_train)))
    random.Random(seed).shuffle(order)  # noqa: S311, no secret
    taken = 0
    for name, fraction in (("test", data.test_fraction), ("validation", data.validation_fraction)):
        if name not in given and fraction > 0:
            count = max(1, round(fraction * len(order)))
            splits[name].conversations = [rows_of_train[index] for index in sorted(order[taken : taken + count])]
            taken += count
    splits["train"].conversations = [rows_of_train[index] for index in sorted(order[taken:])]
    _remove_leaks([splits[name] for name in ("test", "validation", "train")])
    return splits


def _remove_leaks(splits: list[Split]) -> None:
    """Leave out what shares its prompt with a row of an earlier split.

    Every answer of a conversation has a prompt, all before it. Two conversations share one where the last prompt of
    either is among the other's: two long ones that merely begin alike do not.
    """
    last_prompts: set[str] = set()
    all_prompts: set[str] = set()
    for split in splits:
        prompts = [_prompts(messages) for messages in split.conversations]
        kept = [
            messages
            for messages, own in zip(split.conversations, prompts, strict=True)
            if own[-1] not in all_prompts and last_prompts.isdisjoint(own)
        ]
        split.left_out["prompt of a held-out row"] = len(split.conversations) - len(kept)
        split.conversations = kept
        last_prompts.update(own[-1] for own in prompts)
        all_prompts.update(prompt for own in prompts for prompt in own)


def _prompts(messages: Messages) -> list[str]:
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return [json.dumps(messages[:index]) for index in answers]


def _with_system(messages: Messages, system: str) -> Messages:
    return messages if messages[0]["role"] == "system" else [{"role": "system", "content": system}, *messages]
