"""Stage: raw rows become tokenised training, validation and test rows, with a data card that counts everything."""

from __future__ import annotations

import json
import random
import statistics
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tasks.artifacts import Artifact, Store
from tasks.chat_formats import Messages, apply_chat_format, default_system, known_format, render
from tasks.conversations import join_rows, to_conversations
from tasks.errors import UserError
from tasks.settings import ChatSettings, DataSettings
from tasks.source import SPLITS, read_rows
from tasks.stage import stage
from tasks.tokenization import Tokens, tokenize

HISTOGRAM_BINS = 24


@dataclass
class Split:
    """The conversations of one split, and what was left out on the way."""

    conversations: list[Messages]
    tokens: list[Tokens] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    """Rows by reason."""
    truncated: int = 0
    """Rows that were cut and kept."""


@stage(libraries=("transformers", "tokenizers", "pyarrow"))
def prepare_dataset(
    source: Artifact, model: Artifact, data: DataSettings, chat: ChatSettings, seed: int, *, store: Store
) -> Artifact:
    """Turn raw rows into tokens and labels.

    Args:
        source: the raw rows.
        model: the base model, for its tokenizer.
        data: shape, split, length.
        chat: chat format and system prompt.
        seed: rules the split and the joining of rows.
        store: where the artifact goes.

    Returns:
        The artifact `dataset`: `{train,validation,test}.parquet` with `input_ids` and `labels` (lists of int32, -100
        where unsupervised), `{validation,test}.jsonl` with the conversations, `tokenizer/`, and `card.json`.

    Raises:
        UserError: rows that cannot be read, no chat format, or no training row left.
    """
    tokenizer = apply_chat_format(AutoTokenizer.from_pretrained(model.path), chat.format)
    splits, empty = _splits(source, data, seed)
    for name, split in splits.items():
        split.conversations = join_rows(split.conversations, data.rows_per_conversation, seed)
        if chat.system is not None:
            split.conversations = [_with_system(messages, chat.system) for messages in split.conversations]
        _fill(split, tokenizer, data, name)
    if not splits["train"].tokens:
        raise UserError(
            f"no training row is left ({_reasons(splits['train'].left_out)})",
            where=data.source,
            fix="Look at data.max_length and data.validation_fraction, and at the rows themselves.",
        )
    with store.draft("dataset") as draft:
        for name, split in splits.items():
            _write(split, name, draft.path)
        tokenizer.save_pretrained(draft.path / "tokenizer")
        card = _card(splits, empty, tokenizer, source, data, chat)
        (draft.path / "card.json").write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        draft.facts = {
            **{key: card[key] for key in ("rows", "tokens", "supervised_tokens", "chat_format", "max_length")},
            "ollama_template": known_format(tokenizer),
            "end_of_turn": str(tokenizer.eos_token),
            "system": default_system(tokenizer) if chat.system is None else chat.system,
        }
    return draft.done()


def _splits(source: Artifact, data: DataSettings, seed: int) -> tuple[dict[str, Split], int]:
    """Read, deduplicate and split the conversations; also the number of empty rows."""
    read: dict[str, list[Messages]] = {}
    empty = duplicates = 0
    for name in SPLITS:
        if (file := source.facts.get(name)) is None:
            continue
        where = data.source if name == "train" else getattr(data, f"{name}_source") or data.source
        rows = read_rows(source.path / str(file), where)
        rows = rows[: data.max_rows] if name == "train" else rows
        conversations, left_out = to_conversations(rows, data, where)
        read[name] = list({json.dumps(messages): messages for messages in conversations}.values())
        duplicates += len(conversations) - len(read[name])
        empty += left_out
    order = list(range(len(read["train"])))
    random.Random(seed).shuffle(order)  # noqa: S311, no secret
    taken = 0
    for name, fraction in (("test", data.test_fraction), ("validation", data.validation_fraction)):
        if name not in read and fraction > 0:
            count = max(1, round(fraction * len(order)))
            read[name] = [read["train"][index] for index in sorted(order[taken : taken + count])]
            taken += count
    read["train"] = [read["train"][index] for index in sorted(order[taken:])]
    splits = {name: Split(read.get(name, [])) for name in SPLITS}
    splits["train"].left_out["duplicate"] = duplicates
    held_out: set[str] = set()
    for name in ("test", "validation", "train"):
        _remove_leaks(splits[name], held_out)
    return splits, empty


def _remove_leaks(split: Split, held_out: set[str]) -> None:
    """Leave out what has the prompt of a row already held out, then hold out this split's prompts."""
    prompts = [json.dumps(messages[:-1]) for messages in split.conversations]
    kept = [messages for messages, prompt in zip(split.conversations, prompts, strict=True) if prompt not in held_out]
    split.left_out["prompt of a held-out row"] = len(split.conversations) - len(kept)
    split.conversations = kept
    held_out.update(prompts)


def _fill(split: Split, tokenizer: PreTrainedTokenizerBase, data: DataSettings, name: str) -> None:
    """Tokenise a split; over-long rows are cut or left out, and what then has no supervised token is left out."""
    kept: list[Messages] = []
    for messages, tokens in zip(split.conversations, tokenize(tokenizer, split.conversations, name), strict=True):
        over_long = len(tokens.input_ids) > data.max_length
        if over_long and data.over_long == "drop":
            split.left_out["over-long"] += 1
            continue
        row = tokens.cut(data.max_length)
        if row.supervised == 0:
            split.left_out["no supervised token"] += 1
            continue
        split.truncated += over_long
        split.tokens.append(row)
        kept.append(messages)
    split.conversations = kept


def _with_system(messages: Messages, system: str) -> Messages:
    return messages if messages[0]["role"] == "system" else [{"role": "system", "content": system}, *messages]


def _write(split: Split, name: str, directory: Path) -> None:
    if not split.tokens:
        return
    ids = pa.list_(pa.int32())
    table = pa.table(
        {
            "input_ids": pa.array([row.input_ids for row in split.tokens], ids),
            "labels": pa.array([row.labels for row in split.tokens], ids),
        }
    )
    pq.write_table(table, directory / f"{name}.parquet")
    if name == "train":
        return
    with (directory / f"{name}.jsonl").open("w", encoding="utf-8") as file:
        for messages in split.conversations:
            prompt = next(message["content"] for message in reversed(messages) if message["role"] == "user")
            row = {"messages": messages, "prompt": prompt, "completion": messages[-1]["content"]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _card(
    splits: dict[str, Split],
    empty: int,
    tokenizer: PreTrainedTokenizerBase,
    source: Artifact,
    data: DataSettings,
    chat: ChatSettings,
) -> dict[str, Any]:
    lengths = sorted(len(row.input_ids) for row in splits["train"].tokens)
    tokens = {name: sum(len(row.input_ids) for row in split.tokens) for name, split in splits.items()}
    supervised = {name: sum(row.supervised for row in split.tokens) for name, split in splits.items()}
    return {
        "source": data.source,
        "source_sha256": source.digest,
        "chat_format": chat.format,
        "max_length": data.max_length,
        "rows": {name: len(split.tokens) for name, split in splits.items()},
        "tokens": tokens,
        "supervised_tokens": supervised,
        "supervised_share": supervised["train"] / tokens["train"],
        "empty_rows": empty,
        "left_out": {name: {why: n for why, n in split.left_out.items() if n} for name, split in splits.items()},
        "truncated": {name: split.truncated for name, split in splits.items()},
        "length": {
            "min": lengths[0],
            "median": statistics.median(lengths),
            "p95": lengths[int(0.95 * (len(lengths) - 1))],
            "max": lengths[-1],
        },
        "histogram": _histogram(lengths),
        "example": render(tokenizer, splits["train"].conversations[0]),
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


def _reasons(left_out: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count) or "none was there"
