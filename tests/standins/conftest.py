"""A client of the stand-in for Ollama."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.standins.ollama_server import ollama_stand_in
from tests.support.ollama_client import KEEPS, Client


@pytest.fixture
def client(request: pytest.FixtureRequest, tmp_path: Path, go_render: Path, tiny_gguf: Path) -> Iterator[Client]:
    """Of a server that keeps files, or of another version."""
    with ollama_stand_in(tmp_path / "models", go_render, getattr(request, "param", KEEPS)) as server:
        yield Client(server, tiny_gguf)
