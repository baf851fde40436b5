"""The chat formats of our own, which render like the Ollama templates in `modelfiles/`."""

from __future__ import annotations

from dataclasses import dataclass


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


def format_names(conjunction: str) -> str:
    """The names of our formats in a row, such as `chatml, llama3 or alpaca`.

    Args:
        conjunction: before the last one.
    """
    *names, last = FORMATS
    return f"{', '.join(names)} {conjunction} {last}"
