"""Models from the Hub: its protocol is answered here, since the Hub cannot be reached from everywhere."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from tasks.engine.artifacts import Artifact, Store
from tasks.engine.errors import TemporaryError, UserError, is_temporary
from tasks.fetch_model import fetch_model
from tasks.model.sources import parameters_of_source, state_of_source, to_fetch
from tasks.settings.finetune import ModelSettings
from tests.standins.hub import COMMIT, Hub


def fetch(store: Store, revision: str | None = None) -> Artifact:
    return fetch_model.function(ModelSettings(name="org/name", revision=revision), store=store)


def refusal(store: Store, revision: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        fetch(store, revision)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def hub(tiny_model: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub("models", Path(shutil.copytree(tiny_model.path, tmp_path / "on-the-hub")))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    with hub.asked_instead(monkeypatch):
        yield hub


def test_the_size_of_a_hub_model_is_known_without_downloading_it(hub: Hub) -> None:
    assert parameters_of_source(ModelSettings(name="org/name")) == 4321
    assert hub.asked == ["/api/models/org/name"]
    hub.reachable = False
    assert parameters_of_source(ModelSettings(name="org/name")) is None


def test_a_hub_model_is_downloaded_once_and_found_again_without_the_hub(hub: Hub, store: Store) -> None:
    (hub.directory / "README.md").write_text("---\nlicense: llama3\n---\n")
    (hub.directory / "pytorch_model.bin").write_bytes(b"not asked for")
    model = fetch(store)
    assert model.path.name == model.facts["revision"] == COMMIT
    assert model.facts["license"] == "llama3"
    assert model.is_whole()
    assert set(model.files) == {path.name for path in hub.directory.iterdir()} - {"README.md", "pytorch_model.bin"}
    assert not any(path.endswith("pytorch_model.bin") for path in hub.asked)
    assert not store.root.exists()
    settings = ModelSettings(name="org/name")
    assert state_of_source(settings) == COMMIT
    hub.reachable = False
    assert fetch(store) == model
    assert state_of_source(settings) == COMMIT


def test_the_room_that_a_download_takes_is_known_before(hub: Hub, store: Store) -> None:
    settings = ModelSettings(name="org/name")
    directory, size = to_fetch(settings, store.root)
    assert directory == Path(constants.HF_HUB_CACHE)
    assert size == sum(path.stat().st_size for path in hub.directory.iterdir())
    fetch(store)
    assert to_fetch(settings, store.root)[1] == 0
    hub.reachable = False
    assert to_fetch(ModelSettings(name="org/another"), store.root)[1] == 0


def test_pickle_weights_are_refused_before_anything_is_downloaded(hub: Hub, store: Store) -> None:
    (hub.directory / "model.safetensors").rename(hub.directory / "pytorch_model.bin")
    assert "pickle files" in refusal(store)
    assert hub.asked == ["/api/models/org/name"]


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (401, "", "no such directory, and no such model on the Hub for you"),
        (404, "RepoNotFound", "no such directory, and no such model on the Hub for you"),
        (403, "GatedRepo", "is gated. Accept its terms at https://huggingface.co/org/name, then log in"),
        (404, "RevisionNotFound", "org/name@v9: the Hub model has no such revision"),
        (403, "", "the Hub refuses with status 403"),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_line(hub: Hub, store: Store, status: int, code: str, message: str) -> None:
    hub.refuses = httpx2.Response(status, headers={"X-Error-Code": code})
    revision = "v9" if code == "RevisionNotFound" else None
    assert message in refusal(store, revision)
    with pytest.raises(UserError):
        state_of_source(ModelSettings(name="org/name", revision=revision))


def test_a_gated_model_shows_itself_only_when_its_files_are_asked_for(
    hub: Hub, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.refuses_files = httpx2.Response(403, headers={"X-Error-Code": "GatedRepo"})
    message = refusal(store)
    assert "is gated" in message
    assert "hf_secret" not in message + caplog.text


@pytest.mark.parametrize("status", [429, 503])
def test_an_overloaded_hub_is_worth_another_attempt(hub: Hub, store: Store, status: int) -> None:
    hub.refuses = httpx2.Response(status)
    with pytest.raises(TemporaryError, match="cannot be reached") as caught:
        fetch(store)
    assert is_temporary(caught.value)


def test_an_unreachable_hub_is_said_in_one_line_and_worth_another_attempt(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store: Store
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")  # nothing listens there any more
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    close_session()
    with pytest.raises(TemporaryError) as caught:
        fetch(store)
    assert is_temporary(caught.value)
    assert "org/name: the Hugging Face Hub cannot be reached" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert state_of_source(ModelSettings(name="org/name")) == ""
