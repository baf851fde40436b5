"""A tokenizer that speaks a chat format: its template, its end-of-turn token and its padding."""

from __future__ import annotations

import copy
from os.path import commonprefix
from typing import TYPE_CHECKING

from tasks.chat.formats import FORMATS
from tasks.chat.rendering import adds_bos, render
from tasks.chat.templates import keep_one_template, prepare_templates
from tasks.engine.errors import UserError
from tasks.settings.finetune import ChatFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_EXCHANGE = [{"role": "user", "content": "U1"}, {"role": "assistant", "content": "A1"}]


def apply_chat_format(tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat) -> PreTrainedTokenizerBase:
    """Return a copy of the tokenizer that speaks a format: template, end-of-turn as its eos token, a padding token.

    The template is the copy that goes into the GGUF (`tasks.chat.templates`).
    No token is added to the vocabulary, so the model keeps its size; padding may therefore equal the eos token.

    Args:
        tokenizer: the base model's.
        chat_format: `tokenizer` keeps the template that it has, or one of several (`keep_one_template`).

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
        keep_one_template(tokenizer)
        prepare_templates(tokenizer)
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
        prepare_templates(tokenizer)
        tokenizer.eos_token = FORMATS[chat_format].end_of_turn or tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that the template puts after an assistant's answer, at which generation stops.

    Some templates put it only where another turn follows. A token that stands before the answer too, as one does that
    ends a block of thinking, is taken only where there is no other.

    Raises:
        UserError: there is none, so a trained model would never stop.
    """
    special = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    prompt = render(tokenizer, _EXCHANGE[:1], prompt=True)
    for conversation in (_EXCHANGE, [*_EXCHANGE, {"role": "user", "content": "U2"}]):
        head, _, tail = render(tokenizer, conversation).rpartition("A1")
        before, after = head[len(commonprefix([head, prompt])) :], tail.partition("U2")[0]  # noqa: RUF071 - of texts
        if ends := [token for token in special if token in after]:
            return min(ends, key=lambda token: (token in before, after.index(token)))
    raise UserError(
        "the chat template ends the assistant's turn with no special token, so the model would never stop",
        where="chat.format",
        fix=_advice(tokenizer),
    )


def _fitting(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    vocabulary = tokenizer.get_vocab()
    ends = {name: template.end_of_turn or tokenizer.eos_token for name, template in FORMATS.items()}
    return [name for name, token in ends.items() if token in vocabulary]


def _advice(tokenizer: PreTrainedTokenizerBase) -> str:
    fitting = _fitting(tokenizer)
    return f"Choose one of {', '.join(fitting)}." if fitting else "None fits this model: choose another model.name."
