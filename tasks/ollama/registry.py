"""Where models are registered: a server, or a model directory on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from tasks.ollama.directory import OllamaDirectory
from tasks.ollama.modelfile import OllamaModel
from tasks.ollama.names import ModelName
from tasks.ollama.server import OllamaServer
from tasks.settings.export import OllamaSettings


class Registry(Protocol):
    """What both kinds can. Each method raises `UserError` where the user must act, a server `TemporaryError` too."""

    where: str
    """Said in errors."""

    def models(self) -> dict[ModelName, str]:
        """The digest of each model that is there."""

    def digest(self, name: ModelName) -> str | None:
        """A model's digest, as `ollama list` shows it in full; none if there is no such model."""

    def is_whole(self, name: ModelName) -> bool:
        """Whether a model is there with all of its files, as far as can be told."""

    def create(self, name: ModelName, gguf: Path, gguf_sha256: str, model: OllamaModel) -> str:
        """Register a model, and return its digest."""

    def copy(self, source: ModelName, target: ModelName) -> None:
        """Let a second name stand for a model."""

    def delete(self, name: ModelName) -> None:
        """Remove a model, and of its files those that no other names."""


def registry(settings: OllamaSettings, seconds: float = 600) -> Registry | None:
    """The place that the settings name; none for the target `none`.

    Args:
        settings: target and address.
        seconds: for which a server may leave a request unanswered.
    """
    if settings.target == "server":
        return OllamaServer(settings.host, seconds)
    return OllamaDirectory(settings.models) if settings.target == "store" else None
