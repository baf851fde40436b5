"""Stage: raw rows become tokenised training, validation and test rows, with a data card that counts everything."""

from __future__ import annotations

import json
import random
import statistics
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.artifacts import Artifact, Store
from tasks.chat_formats import Messages, apply_chat_format, default_system, known_format, render
from tasks.conversations import join_rows, to_conversations
from tasks.errors import UserError
from tasks.settings import SOURCE_FIELDS, ChatSettings, DataSettings
from tasks.source import SPLITS, read_rows
from tasks.stage import stage
from tasks.tokenization import Tokens, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HISTOGRAM_BINS = 24
FACTS = (
    *("rows", "tokens", "supervised_tokens", "chat_format", "max_length"),
    *("ollama_template", "end_of_turn", "stops", "system"),
)
"""What later stages read of the data card. It is a file of the artifact, so that its digest covers them."""


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


@stage(
    libraries=("transformers", "tokenizers", "pyarrow"),
    reads={"data": DataSettings.model_fields.keys() - set(SOURCE_FIELDS)},
)
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
    tokenizer = apply_chat_format(_load_tokenizer(model), chat.format)
    splits = _splits(source, data, chat, seed)
    for name, split in splits.items():
        split.conversations, other_systems = join_rows(split.conversations, data.rows_per_conversation, seed)
        split.turns_left_out["another system prompt within a joined conversation"] += other_systems
        _fill(split, tokenizer, data, name)
    if not splits["train"].tokens:
        left_out = _reasons(splits["train"].left_out)
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise UserError(
            f"no training row is left ({reasons or 'all there were are held out'})",
            where=data.source,
            fix="Look at data.max_length and data.validation_fraction, and at the rows themselves.",
        )
    with store.draft("dataset") as draft:
        for name, split in splits.items():
            _write(split, name, draft.path)
        tokenizer.save_pretrained(draft.path / "tokenizer")
        card = _card(splits, tokenizer, source, data, chat) | {"stops": stop_tokens(model, tokenizer)}
        (draft.path / "card.json").write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        draft.facts = {key: card[key] for key in FACTS}
    return draft.done()


def stop_tokens(model: Artifact, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokens that end an answer: the chat format's, and those at which the base model's generation stops.

    Args:
        model: the base model.
        tokenizer: with the chat format.
    """
    path = model.path / "generation_config.json"
    told = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    ids = told if isinstance(told, list) else [told]
    texts = [str(tokenizer.convert_ids_to_tokens(number)) for number in ids if isinstance(number, int)]
    return list(dict.fromkeys([str(tokenizer.eos_token), *texts]))


def _load_tokenizer(model: Artifact) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model.path, trust_remote_code=False)
    except Exception as error:  # from tokenizers come plain ones
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"the tokenizer cannot be loaded ({type(error).__name__}: {said})",
            where=model.path,
            fix="Download the model's tokenizer files again.",
        ) from None


def _splits(source: Artifact, data: DataSettings, chat: ChatSettings, seed: int) -> dict[str, Split]:
    """Read, deduplicate and split the conversations."""
    splits = {name: Split([]) for name in SPLITS}
    given = [name for name in SPLITS if name in source.facts]
    for name in given:
        where = data.source if name == "train" else getattr(data, f"{name}_source") or data.source
        rows = read_rows(source.path / str(source.facts[name]), where)
        split = splits[name]
        if name == "train" and data.max_rows is not None:
            split.left_out["beyond data.max_rows"] = max(0, len(rows) - data.max_rows)
            rows = rows[: data.max_rows]
        found = to_conversations(rows, data, where)
        split.left_out["empty"], split.turns_left_out = found.empty, found.turns_left_out
        if chat.system is not None:
            found.kept = [_with_system(messages, chat.system) for messages in found.kept]
        split.conversations = list({json.dumps(messages): messages for messages in found.kept}.values())
        split.left_out["duplicate"] = len(found.kept) - len(split.conversations)
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
    tokenizer: PreTrainedTokenizerBase,
    source: Artifact,
    data: DataSettings,
    chat: ChatSettings,
) -> dict[str, Any]:
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
        "left_out": {name: _reasons(split.left_out) for name, split in splits.items()},
        "turns_left_out": {name: _reasons(split.turns_left_out) for name, split in splits.items()},
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


def _reasons(left_out: Counter[str]) -> dict[str, int]:
    return {reason: count for reason, count in left_out.items() if count}
