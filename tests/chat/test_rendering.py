"""What a template is given, and what is made of its refusals."""

from __future__ import annotations

import copy

import pytest
from transformers import PreTrainedTokenizerFast

from tasks.chat.capabilities import QUESTION, TOOL
from tasks.chat.rendering import render, without_bos
from tasks.engine.errors import UserError
from tests.support.jinja_templates import EVERY_TOOL


@pytest.fixture
def tokenizer(smollm2_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A copy, for a template of one's own."""
    return copy.deepcopy(smollm2_tokenizer)


def test_thinking_is_on_where_nothing_is_said(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{{ enable_thinking is defined and enable_thinking }}"
    assert render(tokenizer, QUESTION) == render(tokenizer, QUESTION, thinking=True) == "True"
    assert render(tokenizer, QUESTION, thinking=False) == "False"


def test_a_template_gets_only_the_tools_that_there_are(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{{ tools is none }} {{ tools }}"
    assert render(tokenizer, QUESTION) == render(tokenizer, QUESTION, tools=[]) == "True None"
    assert render(tokenizer, QUESTION, tools=[TOOL]) == f"False {[TOOL]}"


@pytest.mark.parametrize(
    "template",
    [
        *(EVERY_TOOL, "{{ raise_exception('not so') }}", "{{ messages.append(1) }}", "{% for m in %}"),
        *("{{ 1 // 0 }}", "{{ '%d' | format('a day') }}", "{{ [1].index(2) }}", "{{ {}['a'].b }}"),
    ],
)
def test_whatever_fails_in_a_template_is_one_clear_error(tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(UserError, match="the chat template refuses a conversation: "):
        render(tokenizer, QUESTION)


def test_a_token_that_the_tokenizer_does_not_put_there_stays(tokenizer: PreTrainedTokenizerFast) -> None:
    assert without_bos(tokenizer, f"{tokenizer.bos_token}user") == f"{tokenizer.bos_token}user"
