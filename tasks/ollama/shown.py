"""Whether a server shows of a model what it was sent."""

from __future__ import annotations

import json
from typing import Any

import ollama

from tasks.engine.errors import UserError
from tasks.ollama.modelfile import OllamaModel
from tasks.ollama.names import ModelName


def check_shown(client: ollama.Client, host: str, name: ModelName, model: OllamaModel, file_type: str) -> None:
    """Compare what the server shows with what was sent, the template aside: which one it takes is its choice.

    Raises:
        UserError: parameters or quantisation differ.
    """
    shown = client.show(str(name))
    parameters: dict[str, list[Any]] = {}
    for line in (shown.parameters or "").splitlines():
        key, _, value = line.partition(" ")
        parameters.setdefault(key, []).append(_shown_value(value.strip()))
    faults = [
        f"parameter {key}"
        for key, value in model.parameters.items()
        if any(sent not in parameters.get(key, []) for sent in (value if isinstance(value, list) else [value]))
    ]
    level = shown.details.quantization_level if shown.details else None
    if level in (None, "", "unknown") or (level != file_type and file_type != "unknown"):
        faults.append(f"quantisation level ({level} in place of {file_type})")
    if faults:
        raise UserError(
            f"the server does not show what was sent: {', '.join(faults)}",
            where=f"{host}, model {name}",
            fix="Update Ollama, or register with ollama.target store.",
        )


def _shown_value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
