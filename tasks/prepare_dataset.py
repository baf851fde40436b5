"""Stage: raw rows become tokenised training, validation and test rows, with a data card that counts everything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.chat.applying import apply_chat_format
from tasks.chat.rendering import Messages
from tasks.chat.templates import keep_one_template
from tasks.data.card import FACTS, data_card, reasons_of, serving_facts
from tasks.data.conversations import join_rows
from tasks.data.splits import Split, read_splits
from tasks.data.tokenization import tokenize
from tasks.engine.artifacts import Artifact, Store
from tasks.engine.errors import UserError
from tasks.engine.logs import run_logger
from tasks.engine.stage import stage
from tasks.settings.finetune import SOURCE_FIELDS, ChatSettings, DataSettings
from tasks.stats.json_files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    loaded = _load_tokenizer(model)
    tokenizer = apply_chat_format(loaded, chat.format)
    template = keep_one_template(loaded) if chat.format == "tokenizer" else None
    if template is not None:
        run_logger().info("Of the tokenizer's chat templates, the one called %r is taken.", template)
    splits = read_splits(source, data, chat, seed)
    for name, split in splits.items():
        split.conversations, other_systems = join_rows(split.conversations, data.rows_per_conversation, seed)
        split.turns_left_out["another system prompt within a joined conversation"] += other_systems
        _fill(split, tokenizer, data, name)
    if not splits["train"].tokens:
        left_out = reasons_of(splits["train"].left_out)
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
        card = data_card(splits, tokenizer, source, data, chat) | {"stops": stop_tokens(model, tokenizer)}
        card |= {"template_name": template} if template is not None else {}
        (draft.path / "card.json").write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        draft.facts = {key: card[key] for key in FACTS} | serving_facts(splits, tokenizer)
        draft.facts["context_length"] = model.facts["context_length"]
    return draft.done()


def stop_tokens(model: Artifact, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokens that end an answer: the chat format's, and those at which the base model's generation stops.

    Args:
        model: the base model.
        tokenizer: with the chat format.
    """
    path = model.path / "generation_config.json"
    stops = read_json(path).get("eos_token_id") if path.is_file() else None
    ids = stops if isinstance(stops, list) else [stops]
    texts = [str(tokenizer.convert_ids_to_tokens(number)) for number in ids if isinstance(number, int)]
    return list(dict.fromkeys([str(tokenizer.eos_token), *texts]))


def _load_tokenizer(model: Artifact) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model.path, trust_remote_code=False)
    except Exception as error:  # from tokenizers come plain ones
        why = " ".join(str(error).split())[:200]
        raise UserError(
            f"the tokenizer cannot be loaded ({type(error).__name__}: {why})",
            where=model.path,
            fix="Download the model's tokenizer files again.",
        ) from None


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
        split.turns_left_out["earlier answers, which the chat template rewrites"] += row.rewritten
        split.prompts.append(tokens.prompt_tokens)
        split.tokens.append(row)
        kept.append(messages)
    split.conversations = kept


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
