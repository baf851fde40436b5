"""Ollama's templates, rendered by Go's own text/template, give what the tokenizer's chat template gives."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tasks.artifacts import reference
from tasks.chat_formats import apply_chat_format, known_format, render
from tasks.export_settings import OllamaSettings
from tasks.modelfile import ollama_model
from tasks.settings import ChatFormat
from tests.go_template import rendered
from tests.test_chat_formats import CHAT


@pytest.mark.parametrize("chat_format", ["llama3", "chatml", "alpaca"])
@pytest.mark.parametrize("messages", [CHAT, CHAT[1:], CHAT[:2], CHAT[1:2]], ids=["all", "no system", "first", "alone"])
def test_ollamas_template_equals_the_tokenizers(
    go_render: Path,
    llama3_tokenizer: PreTrainedTokenizerFast,
    chat_format: ChatFormat,
    messages: list[dict[str, str]],
    tmp_path: Path,
) -> None:
    tokenizer = apply_chat_format(llama3_tokenizer, chat_format)
    facts = {"ollama_template": known_format(tokenizer), "end_of_turn": tokenizer.eos_token, "system": None}
    dataset = reference("dataset", tmp_path, [], facts | {"max_length": 64})
    template = ollama_model(dataset, OllamaSettings(), None).template
    assert rendered(go_render, template, messages) == render(tokenizer, messages, prompt=True)
