"""Which of our formats a tokenizer's own template is."""

from __future__ import annotations

import copy

import pytest
from transformers import PreTrainedTokenizerFast

from tasks.chat.recognition import default_system, known_format, own_text
from tests.support.jinja_templates import CHATML, THINKING, TOOLS, TRIMMING

DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + CHATML
)
ONE_ROLE_AT_A_TIME = (
    "{% for m in messages %}{% if loop.index0 and m['role'] == messages[loop.index0 - 1]['role'] %}"
    "{{ raise_exception('roles take turns') }}{% endif %}{% endfor %}" + CHATML
)
TURN = "{{ '<|im_start|>' + m"
LATER_SYSTEM = "{% if m['role'] == 'system' and not loop.first %}{% continue %}{% endif %}"
NO_CONTENT = "{% if not m['content'] %}{% continue %}{% endif %}"
ONLY_FIRST_SYSTEM = CHATML.replace(TURN, LATER_SYSTEM + TURN)
NO_EMPTY_TURNS = CHATML.replace(TURN, NO_CONTENT + TURN)


@pytest.mark.parametrize("template", [CHATML, DEFAULT_SYSTEM, ONE_ROLE_AT_A_TIME, TOOLS, THINKING])
def test_chatml_in_every_plain_conversation_is_chatml(
    smollm2_tokenizer: PreTrainedTokenizerFast, template: str
) -> None:
    tokenizer = copy.deepcopy(smollm2_tokenizer)
    tokenizer.chat_template = template
    assert known_format(tokenizer) == "chatml"
    assert default_system(tokenizer) == ("Be kind." if template == DEFAULT_SYSTEM else None)


@pytest.mark.parametrize(
    "template",
    [TRIMMING, ONLY_FIRST_SYSTEM, NO_EMPTY_TURNS, CHATML + " ", CHATML.replace("<|im_end|>\n", "<|im_end|>")],
)
def test_what_differs_in_one_of_them_is_none_of_ours(smollm2_tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    tokenizer = copy.deepcopy(smollm2_tokenizer)
    tokenizer.chat_template = template
    assert known_format(tokenizer) is None


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (CHATML, "\0system\n\0\0\n\0user\n\0\0\n\0assistant\n\0\0\n\0user\n\0\0\n\0assistant\n"),
        (
            "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
            "{{ 'Says: ' + m['content'] + '<|im_end|>' }}{% endfor %}",
            3 * "Says: \0\0",
        ),
    ],
)
def test_own_text_is_what_stands_between_turns_and_special_tokens(
    smollm2_tokenizer: PreTrainedTokenizerFast, template: str, text: str
) -> None:
    tokenizer = copy.deepcopy(smollm2_tokenizer)
    tokenizer.chat_template = template
    assert own_text(tokenizer) == text
