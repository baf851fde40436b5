"""Whether llama.cpp reads texts as the same tokens as the tokenizer that the model was trained with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.chat.rendering import Messages, render, without_bos

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TORTURE = (
    "one\ntwo\n\nthree\n\n\n\nfour\n",
    "\n leading\r\nand trailing \t \n",
    " a  b   c    d     e        f                  g",
    "\t\tif x:\n\t\t\treturn  {'a': [1, 2, 3]}  # comment\n",
    "def f(x: int) -> int:\n    return x ** 2 if x != 0 else -1\n",
    "0 1 12 123 1234 12345 123456789 3.14159 1e-10 0xFF 1,000,000",
    "Don't we'll I'd they've it's WE'LL o'clock rock'n'roll",
    "Grüße aus Köln, naïve café, Ærøskøbing, Łódź, İstanbul, \u017f ß ẞ",
    "日本語のテキスト、中文字符\uff0c한국어 문장, العربية עברית हिन्दी ไทย",
    "é e\u0301 \ufb01 \u2460 \u2167 ½ ª \u00a0 \u200b \u202f \ufeff",
    "😀 👩‍👩‍👧‍👦 🇩🇪 👍🏽 ❤️ 🏳️‍🌈",
    '{"name": "x", "list": [true, false, null], "nested": {"q": "\\"\\n"}}',
    "https://example.org/a?b=c&d=%20#e user@example.org C:\\Temp\\x.txt",
    "!!! ??? ... --- *** ``` ~~~ <<< >>> {{ }} [[ ]] %% $$ \\\\ //",
    "<b>bold</b> &amp; <!-- comment --> <|not_special|> <s </s",
    "supercalifragilisticexpialidocious" * 3,
    "a" * 64 + " " + "=" * 64,
)
"""Texts at which tokenizers are known to differ; those with the model's own special tokens are added to them."""


class Mismatch(NamedTuple):
    """A text that is read otherwise."""

    text: str
    expected: list[int]
    """Token ids by the tokenizer."""
    read: list[int]
    """Token ids by llama.cpp."""


def mismatches(llama: Any, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Mismatch]:
    """The texts which llama.cpp reads as other tokens than the tokenizer does, special tokens in them included.

    Args:
        llama: a `llama_cpp.Llama`.
        tokenizer: of the merged model.
        texts: to be read, with no token added.
    """
    pairs = (
        Mismatch(
            text,
            list(tokenizer(text, add_special_tokens=False).input_ids),
            list(llama.tokenize(text.encode(), add_bos=False, special=True)),
        )
        for text in texts
    )
    return [pair for pair in pairs if pair.expected != pair.read]


def prompt_mismatches(
    llama: Any, tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Messages]
) -> list[Mismatch]:
    """The prompts which a server on top of llama.cpp would read otherwise than training did.

    Ollama's templates leave the beginning-of-text token out, since llama.cpp adds it where the GGUF says so; so a GGUF
    that says otherwise would lose or double it.

    Args:
        llama: a `llama_cpp.Llama`.
        tokenizer: of the merged model, with the chat template.
        conversations: without the answer.
    """
    wrong = []
    for messages in conversations:
        text = render(tokenizer, messages, prompt=True)
        expected = list(tokenizer(text, add_special_tokens=False).input_ids)
        tokens = list(llama.tokenize(without_bos(tokenizer, text).encode(), add_bos=True, special=True))
        if tokens != expected:
            wrong.append(Mismatch(text, expected, tokens))
    return wrong


def torture(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The texts that are hard to read, and the tokenizer's special tokens as text.

    Args:
        tokenizer: of the merged model.
    """
    yield from TORTURE
    for token in tokenizer.all_special_tokens:
        yield f"a{token}b {token} \n{token}\n"
