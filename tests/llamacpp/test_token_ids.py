"""Texts at which llama.cpp and the tokenizer are compared."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from tasks.llamacpp.token_ids import TORTURE, torture


def test_the_texts_hold_the_tokenizers_special_tokens(smollm2_tokenizer: PreTrainedTokenizerFast) -> None:
    texts = list(torture(smollm2_tokenizer))
    assert len(texts) > len(TORTURE)
    assert all(any(token in text for text in texts) for token in smollm2_tokenizer.all_special_tokens)
