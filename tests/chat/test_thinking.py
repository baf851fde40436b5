from __future__ import annotations

import copy

import pytest
from transformers import PreTrainedTokenizerFast

from tasks.chat.thinking import end_of_thinking, without_thinking
from tests.support.jinja_templates import CHATML, THINKING


@pytest.mark.parametrize(
    ("template", "ending"),
    [
        (CHATML, None),
        (THINKING, "</think>"),
        (CHATML + "{{ '<|START_THINKING|>' }}", "<|END_THINKING|>"),
    ],
)
def test_what_ends_a_block_of_thinking_is_read_in_the_template(
    smollm2_tokenizer: PreTrainedTokenizerFast, template: str, ending: str | None
) -> None:
    tokenizer = copy.deepcopy(smollm2_tokenizer)
    tokenizer.chat_template = template
    assert end_of_thinking(tokenizer) == ending


@pytest.mark.parametrize(
    ("answer", "ending", "rest"),
    [
        ("\n</think>\n\n42", "</think>", "42"),
        ("<think>\nSix by seven.\n</think>\n\n42", "</think>", "42"),
        ("42", "</think>", "42"),
        ("still thinking", "</think>", "still thinking"),
        ("a</think>b", None, "a</think>b"),
    ],
)
def test_an_answer_is_what_follows_the_thinking(answer: str, ending: str | None, rest: str) -> None:
    assert without_thinking(answer, ending) == rest
