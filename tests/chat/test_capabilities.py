"""What a template knows, by what it renders and by what Ollama's server makes of its words."""

from __future__ import annotations

import copy

import pytest
from transformers import PreTrainedTokenizerFast

from tasks.chat.capabilities import has_unseen_tools, knows_thinking, knows_tools, server_capabilities
from tests.support.jinja_templates import CHATML, EVERY_TOOL, EVERYTHING, SMOLLM3_TOOLS, THINKING, TOOLS

REFUSING = "{{ raise_exception('nothing of it') }}"


@pytest.mark.parametrize(
    ("template", "tools", "thinking"),
    [
        (CHATML, False, False),
        (TOOLS, True, False),
        (THINKING, False, True),
        (EVERYTHING, True, True),
        (EVERY_TOOL, True, False),
        (REFUSING, False, False),
        (CHATML + "{# tools, <think></think> #}", False, False),
    ],
)
def test_what_is_rendered_tells_what_a_template_knows(
    smollm2_tokenizer: PreTrainedTokenizerFast, template: str, tools: bool, thinking: bool
) -> None:
    tokenizer = copy.deepcopy(smollm2_tokenizer)
    tokenizer.chat_template = template
    assert (knows_tools(tokenizer), knows_thinking(tokenizer)) == (tools, thinking)


@pytest.mark.parametrize(
    ("template", "capabilities"),
    [
        (CHATML, set()),
        (TOOLS, {"tools"}),
        ("{{ message.tool_calls }}", {"tools"}),
        (THINKING, {"thinking"}),
        ("<think>", set()),
        ("{{ content.split('</think>')[-1] }}", {"thinking"}),
        ('{{ content.split("</think>")[-1] }}', {"thinking"}),
        ("{{ content.split('</think>')[-1] }}{{ reasoning_content }}", set()),
        ("{{ content.split('</think>')[-1] }}<SPECIAL_12>", set()),
        ("{{ reasoning_content }}<think></think> tools", {"tools", "thinking"}),
    ],
)
def test_the_server_goes_by_words(template: str, capabilities: set[str]) -> None:
    assert server_capabilities(template) == capabilities


@pytest.mark.parametrize(
    ("template", "unseen"),
    [
        (CHATML, False),
        (TOOLS, False),
        (SMOLLM3_TOOLS, True),
        (SMOLLM3_TOOLS + "{# no tools #}", False),
        (CHATML + "{# a retooled format #}", False),
    ],
)
def test_tools_that_a_template_writes_of_are_unseen_where_the_server_knows_no_word_of_it(
    smollm2_tokenizer: PreTrainedTokenizerFast, template: str, unseen: bool
) -> None:
    tokenizer = copy.deepcopy(smollm2_tokenizer)
    tokenizer.chat_template = template
    assert has_unseen_tools(tokenizer) == unseen
