from __future__ import annotations

import copy
from typing import get_args

import pytest
from transformers import PreTrainedTokenizerFast

from tasks.chat.applying import apply_chat_format, end_of_turn
from tasks.chat.formats import FORMATS
from tasks.chat.recognition import default_system, known_format
from tasks.chat.rendering import render
from tasks.data.tokenization import tokenize
from tasks.engine.errors import UserError
from tasks.engine.paths import checkout_directory
from tasks.settings.finetune import ChatFormat

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Bye"},
]
GEMMA_LIKE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
)


def test_each_format_has_a_name_in_the_settings_and_a_template_for_ollama() -> None:
    templates = [path.stem for path in checkout_directory("modelfiles").glob("*.gotmpl")]
    assert sorted(FORMATS) == sorted(set(get_args(ChatFormat)) - {"tokenizer"}) == sorted(templates)


RENDERED = {
    "llama3": (
        "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHi<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    ),
    "alpaca": (
        "Be brief.\n\n### Instruction:\nHello\n\n### Response:\nHi<|im_end|>\n\n"
        "### Instruction:\nBye\n\n### Response:\n"
    ),
}
"""CHAT as each format of our own is meant to render it."""


@pytest.mark.parametrize("chat_format", FORMATS)
def test_formats(llama3_tokenizer: PreTrainedTokenizerFast, chat_format: str) -> None:
    tokenizer = apply_chat_format(llama3_tokenizer, chat_format)
    assert render(tokenizer, CHAT, prompt=True) == RENDERED[chat_format], "write down what it is to be"
    assert known_format(tokenizer) == chat_format
    assert default_system(tokenizer) is None
    assert end_of_turn(tokenizer) == tokenizer.eos_token
    assert tokenizer.pad_token is not None
    assert len(tokenizer) == len(llama3_tokenizer), "no token is added"


def test_the_tokenizers_own_format(smollm2_tokenizer: PreTrainedTokenizerFast) -> None:
    before = smollm2_tokenizer.chat_template
    tokenizer = apply_chat_format(smollm2_tokenizer, "tokenizer")
    assert tokenizer.chat_template == before == smollm2_tokenizer.chat_template
    assert known_format(tokenizer) == "chatml"
    assert default_system(tokenizer) == "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def test_a_template_without_system_role(smollm2_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = copy.deepcopy(smollm2_tokenizer)
    tokenizer.chat_template = GEMMA_LIKE
    applied = apply_chat_format(tokenizer, "tokenizer")
    assert applied.eos_token == "<|im_end|>"
    assert known_format(applied) is None and default_system(applied) is None
    with pytest.raises(UserError, match="System role not supported"):
        render(applied, CHAT)


def test_a_greeting_before_the_first_question_is_context(smollm2_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = apply_chat_format(smollm2_tokenizer, "chatml")
    (tokens,) = tokenize(tokenizer, [[{"role": "assistant", "content": "Welcome!"}, *CHAT[1:3]]], "test")
    assert tokenizer.decode([label for label in tokens.labels if label != -100]) == "Hi<|im_end|>"
    assert "Welcome!" in tokenizer.decode(tokens.input_ids)


def test_a_token_that_stands_before_the_answer_too_ends_no_turn_where_there_is_another(
    smollm2_tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer = copy.deepcopy(smollm2_tokenizer)
    answer = "'<|im_start|>assistant\n<think><|im_end|>' + m['content'] + '<|im_end|><|endoftext|>'"
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ " + answer + " }}"
        "{% else %}{{ '<|im_start|>user\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    assert end_of_turn(tokenizer) == "<|endoftext|>"
