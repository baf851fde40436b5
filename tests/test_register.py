"""Registration, through the real `ollama` client against the stand-in server, and into a model directory."""

from __future__ import annotations

import json
import re
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import ollama
import pytest
from packaging.version import Version
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tasks.chat.applying import apply_chat_format
from tasks.engine.artifacts import Artifact, Store
from tasks.engine.errors import TemporaryError, UserError
from tasks.ollama.next_commands import needed, next_commands
from tasks.ollama.server import OllamaServer
from tasks.register import is_registered, register
from tasks.settings.export import OllamaSettings
from tests.standins.ollama_models import config_of
from tests.standins.ollama_server import Faults, Handler, OllamaStandIn, ollama_stand_in
from tests.support.made_artifacts import make_dataset

TINY: list[Path] = []
TOKENIZERS: list[PreTrainedTokenizerBase] = []


@pytest.fixture(autouse=True)
def tiny(tiny_gguf: Path, smollm2_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    TINY[:] = [tiny_gguf]
    TOKENIZERS[:] = [apply_chat_format(smollm2_tokenizer, "chatml")]
    monkeypatch.setattr("tasks.ollama.server.ANSWER", 4)  # it never ends, and need not say more


def make_gguf(store: Store, fill: int = 1) -> Artifact:
    """A model that llama.cpp runs; `fill` tells several apart."""
    with store.draft("gguf") as draft:
        content = TINY[0].read_bytes()
        (draft.path / "model.gguf").write_bytes(content[:-1] + bytes([fill]))
    return draft.done()


def made_names(models: Path) -> list[str]:
    """The names of all models in a directory."""
    return sorted("/".join(path.parts[-2:]) for path in (models / "manifests").glob("*/*/*/*"))


def manifest_of(models: Path, registration: Artifact) -> Path:
    model, _, tag = registration.facts["model"].partition(":")
    return models / "manifests/registry.ollama.ai/library" / model / tag


IN_USE = Artifact(kind="promotion", path=Path(), files={}, size=0, facts={"promoted": True})


@pytest.fixture
def server(tmp_path: Path, go_render: Path) -> Any:
    with ollama_stand_in(tmp_path / "models", go_render) as running:
        yield running


def run(store: Store, settings: OllamaSettings, name: str = "demo-grit", fill: int = 1, **facts: Any) -> Artifact:
    return register.function(
        make_gguf(store, fill), dataset=make_dataset(store, TOKENIZERS[0], **facts), settings=settings, name=name,
        license_name="apache-2.0", store=store,
    )  # fmt: skip


@pytest.mark.parametrize("target", ["server", "store"])
def test_a_registered_model_is_listed_and_shown(store: Store, server: OllamaStandIn, target: Any) -> None:
    settings = OllamaSettings(target=target, host=server.url, models=server.models, parameters={"temperature": 0.5})
    registration = run(store, settings)
    client = ollama.Client(host=server.url)
    (listed,) = client.list().models
    assert listed.model == registration.facts["model"]
    assert re.fullmatch(r"demo-grit:\d{4}-\d\d-\d\d-[0-9a-f]{8}", registration.facts["model"])
    assert listed.digest == registration.facts["digest"]
    shown = client.show(registration.facts["model"])
    assert shown.template is not None and shown.template.endswith("<|im_start|>assistant\n")
    assert shown.details is not None and shown.details.quantization_level == "Q8_0"
    parameters = [line.split(maxsplit=1) for line in (shown.parameters or "").splitlines()]
    assert ["stop", '"<|im_end|>"'] in parameters and ["num_ctx", "8192"] in parameters
    assert ["temperature", "0.5"] in parameters
    assert next_commands(registration, IN_USE)[-1] == "ollama run demo-grit"
    modelfile = (registration.path / "Modelfile").read_text()
    (from_,) = [line.removeprefix("FROM ") for line in modelfile.splitlines() if line.startswith("FROM ")]
    assert (registration.path / from_).samefile(make_gguf(store).path / "model.gguf"), (
        "as Ollama reads it: beside the Modelfile"
    )
    assert str(store.root) not in modelfile + json.dumps(registration.facts), "holds on any machine"


def test_without_registration_there_is_a_modelfile(store: Store, tmp_path: Path) -> None:
    settings = OllamaSettings(target="none", models=tmp_path / "models")
    registration = run(store, settings)
    (command,) = next_commands(registration, IN_USE)
    assert command.startswith("ollama create demo-grit -f ") and (registration.path / "Modelfile").is_file()
    assert not needed(registration) and not (tmp_path / "models").exists()


@pytest.mark.parametrize("target", ["store", "none"])
def test_a_format_of_its_own_needs_a_new_ollama(store: Store, tmp_path: Path, target: Any) -> None:
    """What Go cannot render is left to the template that the GGUF holds."""
    settings = OllamaSettings(target=target, models=tmp_path / "models")
    registration = run(store, settings, ollama_template=None)
    lines = (registration.path / "Modelfile").read_text().splitlines()
    assert "REQUIRES 0.30.0" in lines and any("Needs Ollama 0.30 or newer" in line for line in lines)
    assert not any(line.startswith("TEMPLATE") for line in lines)
    assert needed(registration) == "Ollama 0.30 or newer"
    if target == "store":
        manifest = json.loads(manifest_of(settings.models, registration).read_text())
        kinds = [layer["mediaType"].rsplit(".", 1)[1] for layer in manifest["layers"]]
        assert kinds == ["model", "system", "license", "params"]
        config = settings.models / "blobs" / manifest["config"]["digest"].replace(":", "-")
        assert json.loads(config.read_text())["requires"] == "0.30.0"


def test_what_ollama_cannot_serve_leaves_nothing(store: Store, tmp_path: Path) -> None:
    settings = OllamaSettings(target="store", models=tmp_path / "models", parameters={"temperature": "warm"})
    with pytest.raises(UserError, match="Ollama wants a number here"):
        run(store, settings)
    assert not (tmp_path / "models").exists()


def test_server_and_store_say_the_same(store: Store, tmp_path: Path, go_render: Path) -> None:
    shown = []
    for target in ("server", "store"):
        with ollama_stand_in(tmp_path / target, go_render) as running:
            registration = run(store, OllamaSettings(target=target, host=running.url, models=running.models))
            shown.append(
                ollama.Client(host=running.url).show(registration.facts["model"]).model_dump(exclude={"modified_at"})
            )
    assert shown[0] == shown[1]


def test_a_known_file_is_not_uploaded_again(store: Store, server: OllamaStandIn) -> None:
    settings = OllamaSettings(target="server", host=server.url)
    run(store, settings)
    run(store, settings)
    assert server.requests.count("POST /api/blobs/") == 1


@pytest.mark.parametrize("target", ["server", "store"])
def test_it_is_known_whether_the_model_is_still_there(store: Store, server: OllamaStandIn, target: Any) -> None:
    settings = OllamaSettings(target=target, host=server.url, models=server.models)
    registration = run(store, settings)
    gguf = make_gguf(store)
    assert is_registered(registration, gguf=gguf, settings=settings)
    run(store, settings, fill=2)
    assert is_registered(registration, gguf=gguf, settings=settings), "another model has a tag of its own"
    ollama.Client(host=server.url).delete(registration.facts["model"])
    assert not is_registered(registration, gguf=gguf, settings=settings)
    run(store, settings)
    assert is_registered(registration, gguf=gguf, settings=settings)
    if target == "store":
        blob = server.models / "blobs" / f"sha256-{registration.facts['gguf_sha256']}"
        content = blob.read_bytes()
        blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert not is_registered(registration, gguf=gguf, settings=settings), "a bit of it was flipped"
    else:
        gone = settings.model_copy(update={"host": "http://127.0.0.1:9"})
        assert not is_registered(registration, gguf=gguf, settings=gone), "nobody answers"


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        (Faults(late_error="llama-quantize failed: exit status 1"), "Ollama refuses: llama-quantize failed"),
        (Faults(ends_early=True), "ended at 'verifying conversion'"),
        (Faults(damages_uploads=True), "Ollama refuses: digest mismatch"),
        (Faults(no_json=True), "no Ollama server is behind this address"),
    ],
    ids=["late error", "ends early", "damaged upload", "another server"],
)
def test_a_failed_registration_leaves_the_former_model(
    store: Store, server: OllamaStandIn, faults: Faults, message: str
) -> None:
    settings = OllamaSettings(target="server", host=server.url)
    run(store, settings)
    before = ollama.Client(host=server.url).list()
    server.faults = faults
    with pytest.raises(UserError, match=re.escape(message)):
        run(store, settings, fill=2)
    server.faults = Faults()
    assert ollama.Client(host=server.url).list() == before


def test_a_model_that_the_server_cannot_run_is_tried_again_later(store: Store, server: OllamaStandIn) -> None:
    server.faults = Faults(runs_no_model=True)
    with pytest.raises(TemporaryError, match="Ollama cannot just now .HTTP 500.: model requires more system memory"):
        run(store, OllamaSettings(target="server", host=server.url))


def test_another_quantisation_than_was_sent_is_found_out(
    store: Store, server: OllamaStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.standins.ollama_create.config_of", lambda path: config_of(path) | {"file_type": "F16"})
    with pytest.raises(UserError, match=r"quantisation level \(F16 in place of Q8_0\)"):
        run(store, OllamaSettings(target="server", host=server.url))


def test_a_server_that_shows_something_else_is_found_out(store: Store, server: OllamaStandIn) -> None:
    server.faults = Faults(shows_no_parameters=True)
    with pytest.raises(UserError, match="does not show what was sent: parameter num_ctx, parameter stop"):
        run(store, OllamaSettings(target="server", host=server.url))


def test_a_failing_disk_leaves_the_former_model(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = tmp_path / "models"
    settings = OllamaSettings(target="store", models=models)
    manifest = manifest_of(models, run(store, settings))
    before = manifest.read_bytes()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        run(store, settings, fill=2)
    assert manifest.read_bytes() == before
    assert len(made_names(models)) == 1
    assert not list(models.rglob("tmp*")), "no half-written file is left"


def test_files_on_disk_are_as_ollama_lays_them_out(store: Store, tmp_path: Path) -> None:
    models = tmp_path / "models"
    registration = run(store, OllamaSettings(target="store", models=models))
    manifest = json.loads(manifest_of(models, registration).read_text())
    kinds = [layer["mediaType"].rsplit(".", 1)[1] for layer in manifest["layers"]]
    assert kinds == ["model", "template", "system", "license", "params"]
    for layer in [manifest["config"], *manifest["layers"]]:
        blob = models / "blobs" / layer["digest"].replace(":", "-")
        assert blob.stat().st_size == layer["size"]
        assert stat.S_IMODE(blob.stat().st_mode) == 0o644
    config = json.loads((models / "blobs" / manifest["config"]["digest"].replace(":", "-")).read_text())
    assert (config["model_family"], config["file_type"], config["model_type"]) == ("llama", "Q8_0", "3.22M")


def test_a_name_in_another_case_takes_the_known_spelling(store: Store, tmp_path: Path) -> None:
    models = tmp_path / "models"
    for name in ("Demo-Grit", "demo-grit"):
        run(store, OllamaSettings(target="store", models=models), name)
    assert [path.name for path in (models / "manifests/registry.ollama.ai/library").iterdir()] == ["Demo-Grit"]


@pytest.mark.parametrize(
    ("text", "version"),
    [("0.34.1", "0.34.1"), ("0.30.0-rc2", "0.30.0"), ("0.0.0", None), ("built yesterday", None)],
)
def test_the_servers_version_is_read_where_it_has_one(server: OllamaStandIn, text: str, version: str | None) -> None:
    server.version = replace(server.version, text=text)
    assert OllamaServer(server.url).version() == (Version(version) if version else None)


def test_a_gateway_in_place_of_a_version_may_be_tried_again(
    server: OllamaStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Handler, "_version", lambda self: self._send(502, {"error": "bad gateway"}))
    with pytest.raises(TemporaryError, match=r"cannot just now .HTTP 502.: .*bad gateway"):
        OllamaServer(server.url).version()
    monkeypatch.setattr(Handler, "_version", lambda self: self._send(200, ["0.34.0"]))
    assert OllamaServer(server.url).version() is None


def test_a_server_that_is_down_may_be_tried_again(store: Store) -> None:
    with pytest.raises(TemporaryError, match=r"http://127.0.0.1:9: no Ollama server answers. Start `ollama serve`"):
        run(store, OllamaSettings(target="server", host="http://127.0.0.1:9"))


def test_a_server_that_is_overloaded_may_be_tried_again(store: Store, server: OllamaStandIn) -> None:
    server.faults = Faults(overloaded=True)
    with pytest.raises(TemporaryError, match=r"cannot just now \(HTTP 503\): server busy"):
        run(store, OllamaSettings(target="server", host=server.url))
