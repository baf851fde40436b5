"""Tokens and labels of rows whose chat template thinks, or renders earlier turns otherwise than they were generated."""

from __future__ import annotations

import copy

import pytest
from transformers import PreTrainedTokenizerFast

from tasks.chat.applying import apply_chat_format
from tasks.chat.rendering import Messages, render
from tasks.data.tokenization import UNSUPERVISED, Tokens, tokenize
from tasks.engine.errors import UserError
from tests.support.jinja_templates import CHATML, LATEST_THOUGHTS, PROMPT, TURN

OPENED = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
OPENING = CHATML.replace(PROMPT, OPENED)
"""The prompt opens a block of thinking that no turn has."""
OWN_END = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant\n<think></think>' + m['content'] + '<|im_end|>\n' }}"
    "{% else %}" + TURN + "{% endif %}{% endfor %}" + OPENED
)
"""Each turn has an empty block of the template's own."""
LEFT_OPEN = OWN_END.replace("<think></think>", "<think>\n")
"""No turn's block ends."""
COHERE = OPENING.replace("<think>\n", "<|START_THINKING|>")
ENDED_BEFORE_THE_NEXT = CHATML.replace(
    "'<|im_end|>\n'", "('' if loop.last and m['role'] == 'assistant' else '<|im_end|>')"
)
REWORDING = CHATML.replace(PROMPT, PROMPT.replace("assistant", "helper"))
STOPPING_EARLY = CHATML.replace(
    TURN, "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{{ '<|im_end|>' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}",
)  # fmt: skip


def turns(*texts: str) -> Messages:
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]


ONE, TWO = turns("Hello", "Hi"), turns("Hello", "Hi", "Bye", "See you")


def speaking(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    applied = apply_chat_format(changed, "tokenizer")
    assert isinstance(applied, PreTrainedTokenizerFast)
    return applied


def row(tokenizer: PreTrainedTokenizerFast, messages: Messages) -> tuple[Tokens, str, str]:
    """The tokens of a row, what stands before the last answer, and what is supervised."""
    (tokens,) = tokenize(tokenizer, [messages], "test")
    supervised = [label for label in tokens.labels if label != UNSUPERVISED]
    before = tokens.input_ids[: tokens.prompt_tokens]
    return tokens, str(tokenizer.decode(before)), str(tokenizer.decode(supervised))


@pytest.mark.parametrize("messages", [ONE, TWO])
@pytest.mark.parametrize(
    ("template", "ending"),
    [
        (OPENING, "\n</think>\n\n"),
        (OWN_END, "</think>"),
        (LEFT_OPEN, "\n</think>\n\n"),
        (OWN_END.replace("<think></think>", "<think>"), "\n</think>\n\n"),
        (LATEST_THOUGHTS, "<think>\n\n</think>\n\n"),
        (COHERE, "<|END_THINKING|>"),
    ],
)
def test_the_last_answer_ends_the_block_of_thinking_that_its_prompt_opens(
    smollm2_tokenizer: PreTrainedTokenizerFast, template: str, ending: str, messages: Messages
) -> None:
    tokenizer = speaking(smollm2_tokenizer, template)
    tokens, before, supervised = row(tokenizer, messages)
    prompt = render(tokenizer, messages[:-1], prompt=True)
    assert before == prompt, "the model reads what the server sends"
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    assert tokens.input_ids[: len(ids)] == ids
    assert supervised == f"{ending}{messages[-1]['content']}<|im_end|>"
    assert tokens.rewritten == len(messages) // 2 - 1


@pytest.mark.parametrize("template", [OPENING, OWN_END])
def test_thoughts_of_an_answer_are_supervised_where_the_template_shows_them(
    smollm2_tokenizer: PreTrainedTokenizerFast, template: str
) -> None:
    template = template.replace("<think></think>", "")
    messages = turns("Hello", "<think>\nA greeting.\n</think>\n\nHi")
    _, before, supervised = row(speaking(smollm2_tokenizer, template), messages)
    assert before.endswith("assistant\n<think>\n")
    assert supervised == "A greeting.\n</think>\n\nHi<|im_end|>"


def test_an_end_of_turn_that_only_another_turn_brings_is_learnt(smollm2_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = speaking(smollm2_tokenizer, ENDED_BEFORE_THE_NEXT)
    assert tokenizer.eos_token == "<|im_end|>"
    tokens, _, supervised = row(tokenizer, TWO)
    assert supervised == "Hi<|im_end|>See you<|im_end|>"
    assert tokens.rewritten == 0


@pytest.mark.parametrize(
    ("template", "messages", "why"),
    [
        (REWORDING, ONE, r"otherwise than the row.*after '.*\\nHello.*', 'helper\\n' in place of 'assistant\\nHi<"),
        (STOPPING_EARLY, ONE, r"puts <\|im_end\|> before an answer too, where the model would stop"),
    ],
)
def test_what_cannot_be_trained_is_refused_with_its_reason(
    smollm2_tokenizer: PreTrainedTokenizerFast, template: str, messages: Messages, why: str
) -> None:
    with pytest.raises(UserError, match=rf"^chat.format: .*{why}"):
        row(speaking(smollm2_tokenizer, template), messages)


@pytest.mark.parametrize("answer", ["<|im_end|>", "<|im_end|> is a token", "<think>", "a</think>b"])
def test_control_tokens_within_an_answer_are_no_reason_to_refuse_it(
    smollm2_tokenizer: PreTrainedTokenizerFast, answer: str
) -> None:
    _, _, supervised = row(speaking(smollm2_tokenizer, CHATML), turns("Hello", answer))
    assert supervised == f"{answer}<|im_end|>"


def test_an_end_of_thinking_within_an_answer_ends_no_block(smollm2_tokenizer: PreTrainedTokenizerFast) -> None:
    _, _, supervised = row(speaking(smollm2_tokenizer, OPENING), turns("Hello", "a</think>b"))
    assert supervised == "\n</think>\n\na</think>b<|im_end|>"


def test_an_answer_that_holds_an_end_of_turn_is_learnt_whole(smollm2_tokenizer: PreTrainedTokenizerFast) -> None:
    _, _, supervised = row(speaking(smollm2_tokenizer, ENDED_BEFORE_THE_NEXT), turns("Hello", "<|im_end|> is a token"))
    assert supervised == "<|im_end|> is a token<|im_end|>"


@pytest.mark.parametrize(
    ("labels", "prompt_tokens"),
    [
        ([-100, -100, 5, 6], 2),
        ([-100, 5, 6, -100, -100, 7], 5),
        ([-100, 5, 6, -100], 1),
        ([5, 6], 0),
        ([-100, -100], 0),
        ([], 0),
    ],
)
def test_prompt_tokens_are_those_before_the_last_answer(labels: list[int], prompt_tokens: int) -> None:
    assert Tokens([1] * len(labels), labels).prompt_tokens == prompt_tokens


def test_a_cut_row_keeps_its_count_of_rewritten_answers() -> None:
    assert Tokens([1, 2, 3], [-100, 2, 3], 4).cut(2) == Tokens([1, 2], [-100, 2], 4)
