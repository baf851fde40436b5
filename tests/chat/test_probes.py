"""The conversations at which renderings are compared."""

from __future__ import annotations

import copy
import json

import pytest
from transformers import PreTrainedTokenizerFast

from tasks.chat.probes import PLAIN, WITH_THINKING, WITH_TOOLS, Probe, probes
from tests.support.jinja_templates import CHATML, EVERYTHING, THINKING, TOOLS

NAMES = [{probe.name for probe in group} for group in (PLAIN, WITH_TOOLS, WITH_THINKING)]


def asked(tokenizer: PreTrainedTokenizerFast, template: str) -> tuple[Probe, ...]:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return probes(changed)


@pytest.mark.parametrize(("template", "groups"), [(CHATML, (0,)), (TOOLS, (0, 1)), (THINKING, (0, 2))])
def test_a_template_is_asked_what_it_knows(
    smollm2_tokenizer: PreTrainedTokenizerFast, template: str, groups: tuple[int, ...]
) -> None:
    names = {probe.name for probe in asked(smollm2_tokenizer, template)}
    assert names == set().union(*(NAMES[group] for group in groups))


def test_one_that_knows_both_is_asked_both_at_once(smollm2_tokenizer: PreTrainedTokenizerFast) -> None:
    every = asked(smollm2_tokenizer, EVERYTHING)
    assert set().union(*NAMES) < {probe.name for probe in every}
    assert any(probe.tools and probe.thinking is False for probe in every)


def test_each_can_be_sent_and_answered(smollm2_tokenizer: PreTrainedTokenizerFast) -> None:
    every = asked(smollm2_tokenizer, EVERYTHING)
    assert len({probe.name for probe in every}) == len(every)
    for probe in every:
        assert json.loads(json.dumps(probe.messages)) == probe.messages
        assert probe.messages[-1]["role"] in ("user", "tool"), "a server would go on with the assistant's turn"


def test_tools_come_in_the_order_of_the_server() -> None:
    for tool in (tool for probe in WITH_TOOLS for tool in probe.tools):
        assert list(tool) == ["type", "function"]
        assert list(tool["function"]) == ["name", "description", "parameters"]
        assert list(tool["function"]["parameters"]) == ["type", "required", "properties"]


def test_only_two_of_the_plain_ones_have_a_role_twice_in_a_row() -> None:
    assert [probe.name for probe in PLAIN if not probe.alternates] == ["two questions in a row", "two answers in a row"]
