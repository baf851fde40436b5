"""Vocabularies as llama.cpp's converter writes them, of tokenizers with a token at the beginning of each text too."""

from __future__ import annotations

import copy
import json
from pathlib import Path

from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, PreTrainedTokenizerFast

from tasks.chat.rendering import adds_bos
from tasks.export.converter import find_converter, run_converter
from tasks.settings.export import ExportSettings

BOS = "<|begin_of_text|>"


def with_bos(llama3_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A copy that puts a token at the beginning of each text, as Llama 3's does.

    Args:
        llama3_tokenizer: has that token.
    """
    tokenizer = copy.deepcopy(llama3_tokenizer)
    tokenizer.bos_token = BOS
    number = tokenizer.convert_tokens_to_ids(BOS)
    process = TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, number)])
    tokenizer.backend_tokenizer.post_processor = process
    assert adds_bos(tokenizer)
    return tokenizer


def write_vocabulary(
    tokenizer: PreTrainedTokenizerFast, llama3_tokenizer: PreTrainedTokenizerFast, model: Path, directory: Path
) -> Path:
    """Write a GGUF without tensors.

    Args:
        tokenizer: its own, with or without a token at the beginning.
        llama3_tokenizer: without.
        model: a directory with the model's configuration.
        directory: an empty one.
    """
    config = AutoConfig.from_pretrained(model)
    config.vocab_size = len(tokenizer)
    config.save_pretrained(directory)
    # Told by a flag alone: the converter knows SmolLM2's pre-tokenizer by a text's tokens, and one more changes them.
    plain = copy.deepcopy(tokenizer)
    plain.backend_tokenizer.post_processor = llama3_tokenizer.backend_tokenizer.post_processor
    plain.save_pretrained(directory)
    config_file = directory / "tokenizer_config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"add_bos_token": adds_bos(tokenizer)}))
    file = directory / "vocabulary.gguf"
    run_converter(find_converter(ExportSettings()), directory, file, gguf_type="f16", vocabulary_only=True)
    return file
