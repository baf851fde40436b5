"""The copy of a template that goes into tokenizer and GGUF."""

from __future__ import annotations

import copy

import pytest
from transformers import PreTrainedTokenizerFast

from tasks.chat.applying import apply_chat_format
from tasks.chat.capabilities import QUESTION, TOOL
from tasks.chat.probes import PLAIN
from tasks.chat.rendering import render
from tasks.chat.templates import RULE, keep_one_template, pinned_date, prepare_templates
from tasks.settings.finetune import ChatFormat
from tests.support.jinja_templates import (
    CHATML,
    COMPUTED_DATE,
    DATED,
    EVERY_TOOL,
    GIVEN_DATE,
    THINKING,
    TOOLS,
    TRIMMING,
)

UNDATED = (TRIMMING, TOOLS, THINKING)
BEGINNINGS = (
    *("", "\n", "\n\n", "  ", " \n  ", "text\n", "text\n  ", "{# a comment #}", "{#- a comment -#}\n", "{{- '' }}\n"),
    *("\t{% set x = 1 %}\n", "{%- set x = 1 -%}\n "),
)


def prepared(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    prepare_templates(changed)
    return changed


@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_the_rule_changes_nothing_that_is_rendered(smollm2_tokenizer: PreTrainedTokenizerFast, beginning: str) -> None:
    for template in UNDATED:
        changed, original = prepared(smollm2_tokenizer, beginning + template), copy.deepcopy(smollm2_tokenizer)
        original.chat_template = beginning + template
        assert changed.chat_template == RULE + original.chat_template
        for probe in PLAIN:
            assert render(changed, probe.messages) == render(original, probe.messages)


def test_the_rule_is_longer_than_the_distance_at_which_a_server_recognises_a_template() -> None:
    assert RULE.count("\u2500") == 120


@pytest.mark.parametrize("chat_format", ["llama3", "alpaca"])
def test_formats_of_our_own_begin_with_the_rule(
    llama3_tokenizer: PreTrainedTokenizerFast, chat_format: ChatFormat
) -> None:
    assert apply_chat_format(llama3_tokenizer, chat_format).chat_template.startswith(RULE)


def test_chatml_is_left_as_it_is_for_servers_recognise_it_rightly(smollm2_tokenizer: PreTrainedTokenizerFast) -> None:
    assert apply_chat_format(smollm2_tokenizer, "chatml").chat_template.startswith("{% for")
    assert prepared(smollm2_tokenizer, CHATML).chat_template == CHATML
    assert prepared(smollm2_tokenizer, "{{ bos_token }}" + CHATML).chat_template.startswith(RULE)


@pytest.mark.parametrize("template", [TOOLS, THINKING])
def test_chatml_that_knows_more_gets_the_rule(smollm2_tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    assert prepared(smollm2_tokenizer, template).chat_template == RULE + template


@pytest.mark.parametrize("template", [DATED, GIVEN_DATE, COMPUTED_DATE, EVERY_TOOL, TRIMMING, CHATML])
def test_a_copy_of_a_copy_is_the_same(smollm2_tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    once = prepared(smollm2_tokenizer, template).chat_template
    assert prepared(smollm2_tokenizer, once).chat_template == once


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ strftime_now('%Y-%m-%d') }}", "2024-07-26"),
        ('{{ strftime_now( "%d %B %Y, %H:%M" ) }}', "26 July 2024, 00:00"),
        ("{{ strftime_now(format='%A') }} {{ strftime_now('%j') }}", "Friday 208"),
        ("{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}", "26 Jul 2024"),
        ("{{ date_string }}", "26 Jul 2024"),
        ("{{ 'Today is ' + datetime + '.' }}", "Today is Jul 26 2024."),
        (
            "{% if not date_string is defined %}{% set date_string = strftime_now('%Y') %}{% endif %}{{ date_string }}",
            "26 Jul 2024",
        ),
        ("{% set f = '%-d %B' %}{{ strftime_now(f) }} {{ strftime_now('%Y') }}", "26 July 2024"),
        ("{{ strftime_now('%H:%M', tz='Europe/Berlin') }}", "00:00"),
        ("{% macro day() %}{{ strftime_now('%d' ~ '%m') }}{% endmacro %}{{ day() }}", "2607"),
        ("{% generation %}{{ date_string }}{% endgeneration %}", "26 Jul 2024"),
    ],
)
def test_the_date_of_the_day_is_a_constant(
    smollm2_tokenizer: PreTrainedTokenizerFast, template: str, text: str
) -> None:
    changed = prepared(smollm2_tokenizer, template)
    assert render(changed, QUESTION) == text
    assert pinned_date(changed) == "26 Jul 2024"


@pytest.mark.parametrize("template", ["{% set date_string = 'never' %}{{ date_string }}", "{{ 'date_string' }}"])
def test_a_template_without_a_date_of_the_day_gets_none(
    smollm2_tokenizer: PreTrainedTokenizerFast, template: str
) -> None:
    changed = prepared(smollm2_tokenizer, template)
    assert changed.chat_template == RULE + template
    assert pinned_date(changed) is None


def test_a_template_that_goes_through_its_tools_gets_an_empty_list(smollm2_tokenizer: PreTrainedTokenizerFast) -> None:
    changed = prepared(smollm2_tokenizer, EVERY_TOOL)
    assert render(changed, QUESTION).startswith("0<|im_start|>")
    assert render(changed, QUESTION, tools=[TOOL]).startswith(f"1{TOOL['function']['name']}<|im_start|>")
    changed.chat_template = changed.chat_template.removeprefix(RULE)
    assert changed.chat_template.endswith(EVERY_TOOL) and changed.chat_template != EVERY_TOOL


@pytest.mark.parametrize(
    ("templates", "name", "kept"),
    [
        ({"tool_use": TOOLS, "default": TRIMMING}, "default", TRIMMING),
        ({"rag": TRIMMING, "tool_use": TOOLS}, "rag", TRIMMING),
        ({"only": TRIMMING}, None, TRIMMING),
        (TRIMMING, None, TRIMMING),
    ],
)
def test_of_several_templates_one_is_kept_and_named(
    smollm2_tokenizer: PreTrainedTokenizerFast, templates: dict[str, str] | str, name: str | None, kept: str
) -> None:
    several = copy.deepcopy(smollm2_tokenizer)
    several.chat_template = templates
    assert apply_chat_format(several, "tokenizer").chat_template == RULE + kept
    assert several.chat_template == templates, "it is a copy that changes"
    assert keep_one_template(several) == name
    assert several.chat_template == kept
