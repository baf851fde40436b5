"""What to type to talk to a registered model."""

from __future__ import annotations

import shlex
from pathlib import Path

from tasks.engine.artifacts import Artifact
from tasks.ollama.directory import OllamaDirectory


def next_commands(registration: Artifact, promotion: Artifact) -> list[str]:
    """What to type to talk to the model, in a terminal for each command.

    Args:
        registration: what `register` returned.
        promotion: what `promote` returned.
    """
    target, promoted = registration.facts["target"], promotion.facts["promoted"]
    name = registration.facts["name"] if promoted or target == "none" else registration.facts["model"]
    if target == "server":
        return [f"ollama run {name}"]
    if target == "store":
        models = shlex.quote(OllamaDirectory(Path(registration.facts["models"])).where)
        return [f"OLLAMA_MODELS={models} ollama serve", f"ollama run {name}"]
    return [f"ollama create {name} -f {shlex.quote(str(registration.path / 'Modelfile'))}"]


def needed(registration: Artifact) -> str:
    """Which Ollama serves the model as it was trained; empty where each version does.

    Args:
        registration: what `register` returned.
    """
    return f"Ollama {registration.facts['needs']} or newer" if registration.facts["needs"] else ""
