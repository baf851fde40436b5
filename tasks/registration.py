"""Stage: the GGUF becomes a model that `ollama run` knows, through a server or written into its model directory."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import ollama
from tqdm import tqdm

from tasks.artifacts import Artifact, Store, file_sha256
from tasks.errors import TemporaryError, UserError
from tasks.modelfile import MODELFILES, OllamaModel, is_servable, ollama_model, render_modelfile
from tasks.ollama_store import CHUNK, ModelName, parse_name, registered_digest, write_model
from tasks.settings import OllamaSettings
from tasks.stage import stage


def is_registered(
    made: Artifact, gguf: Artifact, dataset: Artifact, settings: OllamaSettings, name: str, license_name: str | None
) -> bool:
    """Whether Ollama still has the model that a former registration left there.

    Args:
        made: what the former registration returned.
        gguf: the model file.
        dataset: as for `register`.
        settings: where it is registered.
        name: Ollama model name.
        license_name: as for `register`.
    """
    if settings.target == "none":
        return True
    if settings.target == "store":
        return registered_digest(_directory(settings.models), parse_name(name)) == made.facts["digest"]
    try:
        return listed_digest(_client(settings.host, 10), parse_name(name)) == made.facts["digest"]
    except (ollama.ResponseError, ValueError, httpx.HTTPError, httpx.InvalidURL, ConnectionError):
        return False  # `register` finds out what ails the server


def model_files_sha256(
    gguf: Artifact, dataset: Artifact, settings: OllamaSettings, name: str, license_name: str | None
) -> str:
    """What outside arguments and code decides a registration: the templates in `modelfiles/`."""
    return " ".join(file_sha256(path) for path in sorted(MODELFILES.iterdir()))


@stage(retries=2, libraries=("gguf", "ollama", "jinja2"), watch=model_files_sha256, still=is_registered)
def register(
    gguf: Artifact, dataset: Artifact, settings: OllamaSettings, name: str, license_name: str | None, *, store: Store
) -> Artifact:
    """Register the model.

    Args:
        gguf: the model file.
        dataset: chat format and length of the training rows.
        settings: where to register.
        name: Ollama model name.
        license_name: the base model's, if known.
        store: where the artifact goes.

    Returns:
        The artifact `registration`: `registration.json`, and a Modelfile, which is absent only where Ollama has no
        template and the target is `none`. Nothing in it names a place on this machine: the Modelfile names the GGUF
        relative to itself, as Ollama reads it. `next_command` says what to type.

    Raises:
        UserError: a bad name, a chat format without an Ollama template, or Ollama refuses.
        TemporaryError: no server answers.
    """
    parsed = parse_name(name)
    file, sha256 = gguf.path / "model.gguf", gguf.files["model.gguf"]
    facts = {"name": name, "model": str(parsed), "target": settings.target, "gguf_sha256": sha256}
    if settings.target == "none" and not is_servable(dataset):
        return _recorded(facts, "", store)
    model = ollama_model(dataset, settings, license_name)
    if settings.target == "server":
        with _clear_errors(settings.host):
            facts["digest"] = create_on_server(settings.host, parsed, file, sha256, model)
    elif settings.target == "store":
        facts["digest"] = write_model(_directory(settings.models), parsed, file, sha256, model)
        facts["models"] = str(settings.models)
    from_ = os.path.relpath(file, store.root / "registration" / "any")  # as deep as the artifact will lie
    return _recorded(facts, render_modelfile(model, Path(from_).as_posix()), store)


def next_command(registration: Artifact, gguf: Artifact) -> str:
    """What to type to talk to the model.

    Args:
        registration: what `register` returned.
        gguf: the model file.
    """
    name, target = registration.facts["name"], registration.facts["target"]
    if target == "server":
        return f"ollama run {name}"
    if target == "store":
        models = shlex.quote(str(_directory(Path(registration.facts["models"]))))
        return f"OLLAMA_MODELS={models} ollama serve, and in another terminal: ollama run {name}"
    if "Modelfile" in registration.files:
        return f"ollama create {name} -f {shlex.quote(str(registration.path / 'Modelfile'))}"
    return f"the GGUF is {gguf.path / 'model.gguf'}; Ollama has no template for its chat format"


def _directory(models: Path) -> Path:
    return Path(os.path.abspath(models.expanduser()))  # noqa: PTH100, keeps links as they are


def _recorded(facts: dict[str, Any], modelfile: str, store: Store) -> Artifact:
    with store.draft("registration") as draft:
        if modelfile:
            (draft.path / "Modelfile").write_text(modelfile, encoding="utf-8")
        (draft.path / "registration.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        draft.facts = dict(facts)
    return draft.done()


def create_on_server(host: str, name: ModelName, file: Path, sha256: str, model: OllamaModel) -> str:
    """Upload the file unless it is there, create the model, and check what the server then shows.

    Args:
        host: the server, as a URL or the way OLLAMA_HOST is written.
        name: under which it is registered.
        file: the GGUF.
        sha256: its digest.
        model: template, system prompt, parameters, license.

    Returns:
        The model's digest as the server lists it.

    Raises:
        UserError: the server does not finish, or shows something else than was sent.
    """
    client = _client(host, 600)
    digest = f"sha256:{sha256}"
    upload(client, file, digest)
    status = None
    with tqdm(unit="B", unit_scale=True, desc=f"ollama create {name}") as bar:
        for progress in client.create(
            model=str(name),
            files={file.name: digest},
            template=model.template,
            system=model.system,
            parameters=model.parameters,
            license=model.license,
            stream=True,
        ):
            status = progress.status
            bar.set_postfix_str(status or "")
            if progress.total:
                bar.total = progress.total
                bar.update((progress.completed or 0) - bar.n)
    if status != "success":
        # What is shown under this name may then be the former model, which would pass every check below.
        raise UserError(f"creating {name} ended at {status!r}", where=host, fix="See the server's log.")
    check_shown(client, host, name, model)
    if not (found := listed_digest(client, name)):
        raise UserError(f"the server does not list {name}", where=host, fix="See the server's log.")
    return found


def _client(host: str, seconds: float) -> ollama.Client:
    """A client that waits so long for an answer to begin or go on; without a limit one would wait for ever."""
    return ollama.Client(host=host, timeout=httpx.Timeout(10, read=seconds, write=seconds))


def listed_digest(client: ollama.Client, name: ModelName) -> str | None:
    """A model's digest as a server lists it, if it does; a name that differs only in case is the same name.

    Args:
        client: of the server.
        name: of the model.
    """
    return {(entry.model or "").lower(): entry.digest for entry in client.list().models}.get(str(name).lower())


def upload(client: ollama.Client, file: Path, digest: str) -> None:
    """Send a file unless the server has it.

    Through the connection that the client holds, with its host and key: the client itself can neither ask whether a
    blob is there nor show progress.

    Args:
        client: of the server.
        file: what to send.
        digest: `sha256:` and 64 hexadecimal digits.

    Raises:
        ollama.ResponseError: the server refuses it.
    """
    connection: httpx.Client = client._client
    url, size = f"/api/blobs/{digest}", file.stat().st_size
    if connection.head(url, timeout=60).status_code == httpx.codes.OK:
        return
    bar = {"total": size, "desc": "Uploading to Ollama", "unit": "B", "unit_scale": True}
    with file.open("rb") as raw, tqdm.wrapattr(raw, "read", **bar) as reader:
        chunks = iter(partial(reader.read, CHUNK), b"")
        response = connection.post(url, content=chunks, headers={"Content-Length": str(size)})
    if response.is_error:
        raise ollama.ResponseError(response.text, response.status_code)


def check_shown(client: ollama.Client, host: str, name: ModelName, model: OllamaModel) -> None:
    """Compare what the server shows with what was sent.

    Raises:
        UserError: template or parameters differ, or no quantisation level is known.
    """
    shown = client.show(str(name))
    told: dict[str, list[Any]] = {}
    for line in (shown.parameters or "").splitlines():
        key, _, value = line.partition(" ")
        told.setdefault(key, []).append(_shown_value(value.strip()))
    faults = [
        f"parameter {key}"
        for key, value in model.parameters.items()
        if any(one not in told.get(key, []) for one in (value if isinstance(value, list) else [value]))
    ]
    if shown.template != model.template:
        faults.append("template")
    if shown.details is None or shown.details.quantization_level in (None, "", "unknown"):
        faults.append("quantisation level")
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


@contextmanager
def _clear_errors(host: str) -> Iterator[None]:
    try:
        yield
    except ollama.ResponseError as error:
        if error.status_code == 429 or error.status_code >= 500:
            raise TemporaryError(f"{host}: Ollama cannot just now (HTTP {error.status_code}): {error.error}") from error
        raise UserError(f"Ollama refuses: {error.error}", where=host, fix="See the server's log.") from error
    except (ValueError, httpx.InvalidURL, httpx.UnsupportedProtocol) as error:  # no URL, or an answer that is no JSON
        raise UserError("no Ollama server is behind this address", where=host, fix="Correct ollama.host.") from error
    except (ConnectionError, httpx.TransportError) as error:
        raise TemporaryError(
            f"{host}: no Ollama server answers. Start `ollama serve`, or use --ollama.target store."
        ) from error
