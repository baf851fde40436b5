"""The chat at a terminal."""

from __future__ import annotations

import copy
import os
import pty
import re
import subprocess
import sys
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from flows.chat import answer
from tasks.chat.applying import apply_chat_format
from tasks.chat.rendering import render
from tasks.ollama.modelfile import OllamaModel
from tests.support.jinja_templates import CHATML

LOOP = "import flows.chat\nwhile True: print(repr(flows.chat.ask()), flush=True)"


def read_until(terminal: int, pattern: str) -> str:
    """What the terminal shows, until that ends in a pattern; an OSError where the program ends before."""
    shown = ""
    while not re.search(rf"(?s:{pattern})\Z", shown):
        shown += os.read(terminal, 1024).decode()
    return shown


def test_pasted_lines_are_one_message_and_arrows_move() -> None:
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm"}
    with subprocess.Popen([sys.executable, "-c", LOOP], stdin=theirs, stdout=theirs, env=environment) as chat:
        try:
            os.close(theirs)
            read_until(ours, ">>> ")
            os.write(ours, b"\x1b[200~first\nsecond\x1b[201~\n")  # as terminals mark what is pasted
            assert r"'first\nsecond'" in read_until(ours, "'\r\n.*>>> ")
            os.write(ours, b"ab\x1b[Dc\n")
            assert "'acb'" in read_until(ours, "'\r\n.*>>> ")
        finally:
            chat.kill()
    os.close(ours)


class Remembering:
    """Stands in for llama.cpp: remembers what it is asked, ends its thinking and says hello, in two pieces."""

    def tokenize(self, text: bytes, *, add_bos: bool, special: bool) -> list[str]:
        assert special and not add_bos
        return list(text.decode())

    def create_completion(self, tokens: list[str], **options: Any) -> list[dict[str, Any]]:
        self.prompt, self.options = "".join(tokens), options
        return [{"choices": [{"text": piece}]} for piece in ("</think>\n\nHel", "lo")]


def test_the_prompt_is_rendered_as_in_training(
    smollm2_tokenizer: PreTrainedTokenizerFast, capfd: pytest.CaptureFixture[str]
) -> None:
    thinking = copy.deepcopy(smollm2_tokenizer)
    thinking.chat_template = CHATML + "{{ '<think>' if enable_thinking is true else '<think></think>' }}"
    tokenizer = apply_chat_format(thinking, "tokenizer")
    model = OllamaModel(None, "Be brief.", {"stop": ["<|im_end|>"], "temperature": 0.7, "num_ctx": 4096}, None)
    turns = [{"role": "user", "content": "Hello"}]
    llama: Any = Remembering()
    assert answer(llama, tokenizer, model, turns) == "Hello", "no later prompt holds what was thought"
    assert capfd.readouterr().out == "</think>\n\nHello\n"
    system = {"role": "system", "content": "Be brief."}
    assert llama.prompt == render(tokenizer, [system, *turns], prompt=True)
    assert llama.prompt.endswith("<think>")
    sampling = {"temperature": 0.7, "top_p": 0.95, "top_k": 40}
    assert llama.options == {**sampling, "stop": ["<|im_end|>"], "max_tokens": 512, "stream": True}
