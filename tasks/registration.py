"""Stage: the GGUF becomes a model that `ollama run` knows, through a server or written into its model directory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import ollama
from tqdm import tqdm

from tasks.artifacts import Artifact, Store
from tasks.errors import TemporaryError, UserError
from tasks.modelfile import OllamaModel, ollama_model, render_modelfile
from tasks.ollama_store import parse_name, write_model
from tasks.settings import OllamaSettings
from tasks.stage import stage


@stage(retries=2, cached=False)
def register(
    gguf: Artifact, dataset: Artifact, settings: OllamaSettings, name: str, license_name: str | None, *, store: Store
) -> Artifact:
    """Register the model; repeated for the same model it copies and changes nothing.

    Args:
        gguf: the model file.
        dataset: chat format and length of the training rows.
        settings: where to register.
        name: Ollama model name.
        license_name: the base model's, if known.
        store: where the artifact goes.

    Returns:
        The artifact `registration`: Modelfile and `registration.json`; `next` in its facts is what to type.

    Raises:
        UserError: a bad name, a chat format without an Ollama template, or Ollama refuses.
        TemporaryError: no server answers.
    """
    parsed = parse_name(name)
    model = ollama_model(dataset, settings, license_name)
    file, sha256 = gguf.path / "model.gguf", gguf.files["model.gguf"]
    facts: dict[str, str] = {"name": name, "target": settings.target, "gguf_sha256": sha256}
    modelfile = render_modelfile(model, file)
    if settings.target == "server":
        with _clear_errors(settings.host):
            facts["digest"] = create_on_server(settings.host, name, file, sha256, model)
        facts["next"] = f"ollama run {name}"
    elif settings.target == "store":
        models = Path(os.path.abspath(settings.models.expanduser()))  # noqa: PTH100, keeps links as they are
        facts["digest"] = write_model(models, parsed, file, sha256, model)
        facts["models"] = str(models)
        facts["next"] = f"OLLAMA_MODELS={models} ollama serve & ollama run {name}"
    with store.draft("registration") as draft:
        if settings.target == "none":
            facts["next"] = f"ollama create {name} -f Modelfile, with a FROM line for {file}"
        (draft.path / "Modelfile").write_text(modelfile, encoding="utf-8")
        (draft.path / "registration.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        draft.facts = dict(facts)
    return draft.done()


def create_on_server(host: str, name: str, file: Path, sha256: str, model: OllamaModel) -> str:
    """Upload the file unless it is there, create the model, and check what the server then shows.

    Args:
        host: URL of the server.
        name: Ollama model name.
        file: the GGUF.
        sha256: its digest.
        model: template, system prompt, parameters, license.

    Returns:
        The model's digest as the server lists it.

    Raises:
        UserError: the server shows something else than was sent.
    """
    client = ollama.Client(host=host)
    digest = f"sha256:{sha256}"
    if httpx.head(f"{host.rstrip('/')}/api/blobs/{digest}", timeout=60).status_code != httpx.codes.OK:
        tqdm.write(f"Uploading {file.stat().st_size / 1e6:.0f} MB to {host}")
        client.create_blob(file)
    with tqdm(unit="B", unit_scale=True, desc=f"ollama create {name}") as bar:
        for progress in client.create(
            model=name,
            files={file.name: digest},
            template=model.template,
            system=model.system,
            parameters=model.parameters,
            license=model.license,
            stream=True,
        ):
            bar.set_postfix_str(progress.status or "")
            if progress.total:
                bar.total = progress.total
                bar.update((progress.completed or 0) - bar.n)
    check_shown(client, host, name, model)
    listed = {entry.model: entry.digest for entry in client.list().models}
    return str(listed.get(name if ":" in name else f"{name}:latest"))


def check_shown(client: ollama.Client, host: str, name: str, model: OllamaModel) -> None:
    """Compare what the server shows with what was sent.

    Raises:
        UserError: template or stop parameters differ, or the file is not recognised as quantised.
    """
    shown = client.show(name)
    parameters = shown.parameters or ""
    missing = [
        stop for stop in model.parameters["stop"] if json.dumps(stop) not in parameters and stop not in parameters
    ]
    quantised = shown.details is not None and shown.details.quantization_level not in (None, "", "unknown")
    if shown.template != model.template or missing or not quantised:
        raise UserError(
            f"the server shows another {'template' if shown.template != model.template else 'set of parameters'}",
            where=f"{host}, model {name}",
            fix="Update Ollama, or register with ollama.target store.",
        )


@contextmanager
def _clear_errors(host: str) -> Iterator[None]:
    try:
        yield
    except ollama.ResponseError as error:
        raise UserError(f"Ollama refuses: {error.error}", where=host, fix="See the server's log.") from error
    except (ConnectionError, httpx.TransportError) as error:
        raise TemporaryError(
            f"{host}: no Ollama server answers. Start `ollama serve`, or use --ollama.target store."
        ) from error
