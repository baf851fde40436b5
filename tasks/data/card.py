"""The data card, which counts everything."""

from __future__ import annotations

import statistics
from collections import Counter
from typing import TYPE_CHECKING, Any

from tasks.chat.capabilities import has_unseen_tools, server_capabilities
from tasks.chat.recognition import default_system, known_format, own_text
from tasks.chat.rendering import render
from tasks.chat.templates import pinned_date
from tasks.data.splits import Split
from tasks.engine.artifacts import Artifact
from tasks.settings.finetune import ChatSettings, DataSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


HISTOGRAM_BINS = 24
FACTS = (
    *("rows", "tokens", "supervised_tokens", "chat_format", "max_length"),
    *("ollama_template", "end_of_turn", "stops", "system"),
)
"""What later stages read of the data card. It is a file of the artifact, so that its digest covers them."""


def data_card(
    splits: dict[str, Split],
    tokenizer: PreTrainedTokenizerBase,
    source: Artifact,
    data: DataSettings,
    chat: ChatSettings,
) -> dict[str, Any]:
    """Rows, tokens and lengths of each split, what was left out and why, and an example.

    Args:
        splits: by name, tokenised.
        tokenizer: with the chat format.
        source: the raw rows.
        data: the longest row.
        chat: chat format and system prompt.
    """
    date = pinned_date(tokenizer)
    lengths = sorted(len(row.input_ids) for row in splits["train"].tokens)
    tokens = {name: sum(len(row.input_ids) for row in split.tokens) for name, split in splits.items()}
    supervised = {name: sum(row.supervised for row in split.tokens) for name, split in splits.items()}
    return {
        "source_sha256": source.digest,
        "chat_format": chat.format,
        "ollama_template": known_format(tokenizer),
        "end_of_turn": str(tokenizer.eos_token),
        "system": default_system(tokenizer) if chat.system is None else chat.system,
        "max_length": data.max_length,
        "rows": {name: len(split.tokens) for name, split in splits.items()},
        "tokens": tokens,
        "supervised_tokens": supervised,
        "supervised_share": supervised["train"] / tokens["train"],
        "left_out": {name: reasons_of(split.left_out) for name, split in splits.items()},
        "turns_left_out": {name: reasons_of(split.turns_left_out) for name, split in splits.items()},
        "truncated": {name: split.truncated for name, split in splits.items()},
        "length": {
            "min": lengths[0],
            "median": statistics.median(lengths),
            "p95": lengths[int(0.95 * (len(lengths) - 1))],
            "max": lengths[-1],
        },
        "histogram": _histogram(lengths),
        "example": render(tokenizer, splits["train"].conversations[0]),
        **({"template_date": date} if date else {}),
    }


def serving_facts(splits: dict[str, Split], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What decides how the chat is served; all of it follows from the artifact's files.

    Args:
        splits: by name, tokenised.
        tokenizer: with the chat format.

    Returns:
        What a server takes the chat template to know, whether it writes of tools that the server does not see, the text
        and the system prompt that it puts in by itself, and the longest prompt of a held-out row: its split, its number
        from 1, its tokens.
    """
    prompts = [
        {"split": name, "row": number, "tokens": tokens}
        for name in ("validation", "test")
        for number, tokens in enumerate(splits[name].prompts, 1)
    ]
    return {
        "server_capabilities": sorted(server_capabilities(str(tokenizer.chat_template))),
        "unseen_tools": has_unseen_tools(tokenizer),
        "template_text": own_text(tokenizer),
        "default_system": default_system(tokenizer),
        "longest_prompt": max(prompts, key=lambda prompt: prompt["tokens"], default=None),
    }


def _histogram(lengths: list[int]) -> dict[str, list[int]]:
    """Rows by length in tokens: bin i counts lengths in [edges[i], edges[i + 1])."""
    width = max(1, -(-(lengths[-1] + 1 - lengths[0]) // HISTOGRAM_BINS))
    counts = Counter((length - lengths[0]) // width for length in lengths)
    bins = max(counts) + 1
    return {
        "edges": [lengths[0] + width * index for index in range(bins + 1)],
        "counts": [counts[index] for index in range(bins)],
    }


def reasons_of(left_out: Counter[str]) -> dict[str, int]:
    """Counts by reason, without the reasons that did not occur."""
    return {reason: count for reason, count in left_out.items() if count}
