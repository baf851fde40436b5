"""Stage: the GGUF becomes a model that Ollama knows, under a tag of its own; which tag is in use, promotion decides."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tasks.engine.artifacts import Artifact, Store, file_sha256
from tasks.engine.errors import TemporaryError, UserError
from tasks.engine.paths import checkout_directory
from tasks.engine.stage import stage
from tasks.ollama.directory import OllamaDirectory
from tasks.ollama.modelfile import OllamaModel, ollama_model, render_modelfile
from tasks.ollama.names import ModelName, is_version_of, parse_name, version_name
from tasks.ollama.registry import Registry, registry
from tasks.ollama.served_template import jinja_counts
from tasks.ollama.server import OllamaServer
from tasks.ollama.server_proof import OnServer, served
from tasks.settings.export import OllamaSettings


def is_registered(registration: Artifact, /, *, settings: OllamaSettings, **_others: object) -> bool:
    """Whether Ollama still has the model that a former registration left there.

    Args:
        registration: what the former registration returned.
        settings: where it is registered.
    """
    if (place := registry(settings, 10)) is None:
        return True
    version = parse_name(registration.facts["model"])
    try:
        if isinstance(place, OllamaServer) and str(place.version()) != registration.facts["server"]:
            return False  # another version may format chats otherwise
        return place.digest(version) == registration.facts["digest"] and place.is_whole(version)
    except (UserError, TemporaryError):
        return False  # `register` finds out what ails the server


def model_files_sha256(**_arguments: object) -> str:
    """What outside arguments and code decides a registration: the templates in `modelfiles/`."""
    return " ".join(file_sha256(path) for path in sorted(checkout_directory("modelfiles").iterdir()))


@stage(
    retries=2,
    libraries=("llama-cpp-python", "ollama", "jinja2", "transformers"),
    watch=model_files_sha256,
    still=is_registered,
)
def register(
    gguf: Artifact,
    *,
    dataset: Artifact,
    settings: OllamaSettings,
    name: str,
    license_name: str | None,
    store: Store,
) -> Artifact:
    """Register the model under a tag of its own, and let it answer if a server is there.

    Args:
        dataset: chat format and length of the training rows.
        settings: where to register.
        name: Ollama model name, with the tag that names the model in use.
        license_name: the base model's, if known.
        store: where the artifact goes.

    Returns:
        The artifact `registration`: `registration.json` and a Modelfile. Nothing in it names a place on this machine:
        the Modelfile names the GGUF relative to itself, as Ollama reads it. The facts hold the user's `name`, the
        version's name as `model`, and the oldest version of Ollama that it `needs`, if not any will do. Of a server
        they hold its version as `server`, `chat_fault`, what is wrong with the model's answer, and `rendering`, how its
        prompts compare. `jinja_counts` says whether some Ollama renders the GGUF's own template.

    Raises:
        UserError: a bad name, a chat format that cannot be served, or Ollama refuses.
        TemporaryError: no server answers.
    """
    parsed, place = parse_name(name), registry(settings)
    file, sha256 = gguf.path / "model.gguf", gguf.files["model.gguf"]
    server = place.version() if isinstance(place, OllamaServer) else None
    model = ollama_model(dataset, settings, license_name, server)
    version = _version(place, parsed, sha256, model)
    facts: dict[str, Any] = {
        "name": name, "target": settings.target, "gguf_sha256": sha256, "model": str(version), "needs": model.needs,
        "jinja_counts": jinja_counts(dataset, settings.template),
    }  # fmt: skip
    if place is not None:
        facts["digest"] = place.create(version, file, sha256, model)
    if isinstance(place, OllamaServer):
        prompt = gguf.facts.get("answer", {}).get("prompt", "Hello")
        facts["server"] = str(server)
        facts |= served(OnServer(place, version, model, dataset, server), prompt, proof=settings.template != "none")
    if isinstance(place, OllamaDirectory):
        facts["models"] = str(settings.models)
    from_ = os.path.relpath(file, store.root / "registration" / "any")  # as deep as the artifact will lie
    return _registration(facts, render_modelfile(model, Path(from_).as_posix()), store)


def _version(place: Registry | None, name: ModelName, sha256: str, model: OllamaModel) -> ModelName:
    """The version's name: today's, unless Ollama has the same content under another day's already."""
    content = json.dumps([sha256, asdict(model)], sort_keys=True)
    version = version_name(name, datetime.now(UTC).date(), hashlib.sha256(content.encode()).hexdigest())
    same = (present for present in (place.models() if place else ()) if is_version_of(present, version))
    return next(same, version)


def _registration(facts: dict[str, Any], modelfile: str, store: Store) -> Artifact:
    with store.draft("registration") as draft:
        (draft.path / "Modelfile").write_text(modelfile, encoding="utf-8")
        (draft.path / "registration.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        draft.facts = dict(facts)
    return draft.done()
