"""Checks that cost seconds, made before anything that costs minutes."""

from __future__ import annotations

from tasks.conversion import find_converter
from tasks.ollama_store import parse_name
from tasks.settings import FinetuneSettings
from tasks.training import check_machine


def check_settings(settings: FinetuneSettings) -> None:
    """Check what only later stages would find out: backend, converter, Ollama name.

    Raises:
        UserError: one of them cannot work.
    """
    check_machine(settings.model, settings.training, settings.grit if settings.method == "grit" else None)
    find_converter(settings.export)
    if settings.ollama.target != "none":
        parse_name(settings.ollama_name)
