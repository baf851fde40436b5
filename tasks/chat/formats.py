"""Chat formats: the Jinja template a tokenizer gets, its end-of-turn and padding tokens, and which format it speaks.

The formats of our own render like the Ollama templates in `modelfiles/`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from tasks.engine.errors import UserError
from tasks.settings.finetune import ChatFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class ChatTemplate:
    """A chat format of our own. Its Ollama template, in Go, is `modelfiles/NAME.gotmpl`."""

    jinja: str
    """The tokenizer's template, without the beginning-of-text token."""
    end_of_turn: str | None
    """The token after an answer, which the vocabulary must have; None: whatever token ends a text for the tokenizer."""
    stops: tuple[str, ...]
    """Texts at which Ollama ends an answer. `end_of_turn` is added to them, so that it may be left out.

    An answer that shows one is faulty, whatever the model's format."""


FORMATS: dict[str, ChatTemplate] = {
    "chatml": ChatTemplate(
        jinja=(
            "{% for message in messages %}"
            "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
            "{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
        ),
        end_of_turn="<|im_end|>",
        stops=("<|im_start|>", "<|im_end|>"),
    ),
    "llama3": ChatTemplate(
        jinja=(
            "{% for message in messages %}"
            "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
            " + message['content'] + '<|eot_id|>' }}"
            "{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
        ),
        end_of_turn="<|eot_id|>",
        stops=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "alpaca": ChatTemplate(
        jinja=(
            "{% for message in messages %}"
            "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
            "{% elif message['role'] == 'user' %}"
            "{{ '### Instruction:\n' + message['content'] + '\n\n### Response:\n' }}"
            "{% else %}{{ message['content'] + eos_token + '\n\n' }}{% endif %}"
            "{% endfor %}"
        ),
        end_of_turn=None,
        stops=("### Instruction:", "### Response:"),
    ),
}
"""By the name that the setting `chat.format` has for it."""

_PROBE: Messages = [
    {"role": "system", "content": "S1"},
    {"role": "user", "content": "U1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "U2"},
]


def apply_chat_format(tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat) -> PreTrainedTokenizerBase:
    """Return a copy of the tokenizer that speaks a format: template, end-of-turn as its eos token, a padding token.

    No token is added to the vocabulary, so the model keeps its size; padding may therefore equal the eos token.

    Args:
        tokenizer: the base model's.
        chat_format: `tokenizer` keeps the template that it has.

    Raises:
        UserError: the vocabulary lacks the format's tokens, or there is no template to keep.
    """
    tokenizer = copy.deepcopy(tokenizer)
    if chat_format == "tokenizer":
        if not tokenizer.chat_template:
            raise UserError(
                "the model's tokenizer has no chat template",
                where="chat.format",
                fix=_advice(tokenizer),
            )
        tokenizer.eos_token = end_of_turn(tokenizer)
    else:
        if chat_format not in _fitting(tokenizer):
            needed = FORMATS[chat_format].end_of_turn or "an end-of-text token"
            raise UserError(
                f"the model's vocabulary lacks {needed}, which {chat_format} needs",
                where="chat.format",
                fix=_advice(tokenizer),
            )
        bos = "{{ bos_token }}" if adds_bos(tokenizer) else ""
        tokenizer.chat_template = bos + FORMATS[chat_format].jinja
        tokenizer.eos_token = FORMATS[chat_format].end_of_turn or tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, prompt: bool = False) -> str:
    """The text of a conversation; with `prompt` it ends where the assistant's answer begins.

    Raises:
        UserError: the template refuses the conversation, such as one with a system prompt.
    """
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except TemplateError as error:
        raise UserError(
            f"the chat template refuses a conversation: {error}",
            where="chat.format",
            fix=f"Choose {format_names('or')}, or remove the system prompts.",
        ) from None


def format_names(conjunction: str) -> str:
    """The names of our formats in a row, such as `chatml, llama3 or alpaca`.

    Args:
        conjunction: before the last one.
    """
    *names, last = FORMATS
    return f"{', '.join(names)} {conjunction} {last}"


def known_format(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Which of our formats the tokenizer's template renders like, the beginning-of-text token aside."""
    try:
        rendered = render(tokenizer, _PROBE, prompt=True)
    except UserError:  # a template without a system role is none of ours
        return None
    text = rendered.removeprefix(str(tokenizer.bos_token) if adds_bos(tokenizer) else "")
    for name, template in FORMATS.items():
        ours = tokenizer.apply_chat_template(
            _PROBE, chat_template=template.jinja, tokenize=False, add_generation_prompt=True
        )
        if ours == text:
            return name
    return None


def default_system(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The system prompt that the template puts before a conversation without one, if it does."""
    user = [_PROBE[1]]
    try:
        before, system, after = render(tokenizer, [_PROBE[0], *user]).partition("S1")
    except UserError:  # no system role at all
        return None
    if not system:
        return None
    bare = render(tokenizer, user)
    if not (bare.startswith(before) and bare.endswith(after)):
        return None
    return bare[len(before) : len(bare) - len(after)].strip() or None


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that the template puts after an assistant's answer, at which generation stops.

    Raises:
        UserError: there is none, so a trained model would never stop.
    """
    _, tail = render(tokenizer, _PROBE[1:3]).rsplit("A1", 1)
    special = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    ends = [token for token in special if token in tail]
    if not ends:
        raise UserError(
            "the chat template ends the assistant's turn with no special token, so the model would never stop",
            where="chat.format",
            fix=_advice(tokenizer),
        )
    return min(ends, key=tail.index)


def _fitting(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    vocabulary = tokenizer.get_vocab()
    ends = {name: template.end_of_turn or tokenizer.eos_token for name, template in FORMATS.items()}
    return [name for name, token in ends.items() if token in vocabulary]


def _advice(tokenizer: PreTrainedTokenizerBase) -> str:
    fitting = _fitting(tokenizer)
    return f"Choose one of {', '.join(fitting)}." if fitting else "None fits this model: choose another model.name."


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself puts a beginning-of-text token before a text."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
