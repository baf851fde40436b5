"""Rows from the Hub, read by the real `datasets` from a stand-in for the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets.config
import httpx2
import pytest
from huggingface_hub import HfFileSystem, constants

from tasks.data.files import read_rows
from tasks.engine.artifacts import Store
from tasks.engine.errors import TemporaryError, UserError, is_temporary
from tasks.fetch_data import fetch_data, newest_commit
from tasks.settings.finetune import DataSettings
from tests.standins.hub import COMMIT, Hub

ROWS = [{"instruction": f"Grüße {i}", "input": "", "output": "😀"} for i in range(5)]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    directory = tmp_path / "on-the-hub"
    directory.mkdir()
    (directory / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    hub = Hub("datasets", directory)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets-cache"))
    HfFileSystem.clear_instance_cache()  # it remembers what other tests have listed
    with hub.asked_instead(monkeypatch):
        yield hub


def settings(**more: Any) -> DataSettings:
    return DataSettings(source="org/name", **more)


def refusal(store: Store, **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        fetch_data.function(settings(**more), 1, store=store)
    assert "\n" not in str(caught.value)
    assert not list(store.root.glob("source/*"))
    return str(caught.value)


def test_the_rows_of_a_hub_data_set_are_brought_at_the_commit_that_the_cache_key_names(hub: Hub, store: Store) -> None:
    assert newest_commit(settings(), 1) == COMMIT
    source = fetch_data.function(settings(), 1, store=store)
    assert source.facts == {"train": "train.parquet", "name": "org/name"}
    assert list(read_rows(source.path / "train.parquet", "rows")) == ROWS
    (downloaded,) = {path for path in hub.asked if path.endswith("data.jsonl")}
    assert COMMIT in downloaded


def test_without_the_hub_the_rows_downloaded_last_are_still_known(hub: Hub, store: Store) -> None:
    hub.reachable = False
    assert newest_commit(settings(), 1) == ""
    hub.reachable = True
    fetch_data.function(settings(), 1, store=store)
    hub.reachable = False
    assert newest_commit(settings(), 1) == COMMIT
    assert newest_commit(DataSettings(source="org/other"), 1) == ""


def test_a_split_that_is_not_there_is_named(hub: Hub, store: Store) -> None:
    assert "nights" in refusal(store, split="nights")


def test_a_data_set_without_data_is_no_passing_trouble(hub: Hub, store: Store) -> None:
    (hub.directory / "data.jsonl").rename(hub.directory / "notes.md")
    assert "data" in refusal(store)


def test_a_data_set_that_comes_as_a_script_is_refused(hub: Hub, store: Store) -> None:
    (hub.directory / "data.jsonl").unlink()
    (hub.directory / "name.py").write_text("raise SystemExit('must not run')\n")
    assert "scripts are no longer supported" in refusal(store)


def test_broken_rows_on_the_hub_are_one_clear_line(hub: Hub, store: Store) -> None:
    (hub.directory / "data.jsonl").write_text('{"instruction": "a"}\n{"instruction": \n')
    assert "org/name" in refusal(store)


@pytest.mark.parametrize(("status", "code"), [(401, ""), (404, "RepoNotFound"), (403, "GatedRepo")])
def test_data_that_one_may_not_read_is_said_in_one_line(hub: Hub, store: Store, status: int, code: str) -> None:
    hub.refuses = httpx2.Response(status, headers={"X-Error-Code": code})
    assert f"you may not read it (HTTP {status})" in refusal(store)


def test_a_hub_that_goes_away_during_the_download_is_worth_another_attempt(
    hub: Hub, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # its own retries
    hub.refuses_files = httpx2.Response(503)
    with pytest.raises(TemporaryError, match="org/name: the Hugging Face Hub cannot be reached") as caught:
        fetch_data.function(settings(), 1, store=store)
    assert is_temporary(caught.value)
    assert not list(store.root.glob("source/*"))
    hub.refuses_files = None
    assert fetch_data.function(settings(), 1, store=store).is_whole()
