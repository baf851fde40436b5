"""What to type to talk to a registered model."""

from __future__ import annotations

import shlex
from pathlib import Path

from tasks.engine.artifacts import Artifact
from tasks.ollama.directory import OllamaDirectory


def next_commands(registration: Artifact, promotion: Artifact) -> list[str]:
    """What to type to talk to the model, in a terminal for each command; nothing where Ollama has no template for it.

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
    if "Modelfile" in registration.files:
        return [f"ollama create {name} -f {shlex.quote(str(registration.path / 'Modelfile'))}"]
    return []


def without_commands(gguf: Artifact) -> str:
    """What to say where there is no next command."""
    return f"the GGUF is {gguf.path / 'model.gguf'}; Ollama has no template for its chat format"
