"""A store at a URI: what one machine has made, another finds, and neither trusts what came damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from flows.finetune import Finetuned, finetune, stages
from tasks.engine.artifacts import Artifact, Store
from tasks.engine.errors import TemporaryError, UserError
from tasks.engine.planning import planning
from tasks.engine.remote import Remote
from tasks.settings.presets import Overrides, load_settings
from tests.support.chained_stages import ran, run_chain, runs


@pytest.fixture(params=["file", "memory"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"file://{tmp_path}/shared" if request.param == "file" else f"memory://{tmp_path.name}"


def note_at(store: Store, text: str = "hello") -> Artifact:
    with store.draft("note") as draft:
        (draft.path / "sub").mkdir()
        (draft.path / "sub/a.txt").write_text(text)
        (draft.path / "b.txt").write_text(text * 1000)
    return draft.done()


def test_artifacts_go_there_and_come_back(uri: str, tmp_path: Path) -> None:
    origin, other = Store(tmp_path / "origin", uri), Store(tmp_path / "other", uri)
    note = note_at(origin)
    copy = other.located(origin.portable(note))
    assert copy.path.is_relative_to(other.root)
    assert not other.holds(copy)
    origin.share(note)
    assert other.holds(copy) and not copy.is_whole()
    assert other.bring(copy).is_whole()
    assert (copy.path / "sub/a.txt").read_text() == "hello"
    assert not list((other.root / "drafts").iterdir())


def test_what_comes_damaged_does_not_come(uri: str, tmp_path: Path) -> None:
    origin, other = Store(tmp_path / "origin", uri), Store(tmp_path / "other", uri)
    note = origin.share(note_at(origin))
    files, root = fsspec.url_to_fs(uri)
    files.pipe_file(f"{root}/{origin.portable(note).path.as_posix()}/b.txt", b"jello" * 1000)
    copy = other.located(origin.portable(note))
    assert other.holds(copy), "by its size alone"
    assert not other.bring(copy).is_whole()
    assert not copy.path.exists()


def test_a_file_appears_there_when_it_is_whole(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote, real, cuts = Remote(uri), shutil.copyfileobj, iter([True])
    (tmp_path / "source").write_bytes(b"12345")

    def cut(source: Any, target: Any, length: int) -> None:
        if next(cuts, False):
            target.write(b"12")
            raise OSError("the line is cut")
        real(source, target, length)

    monkeypatch.setattr("tasks.engine.remote.shutil.copyfileobj", cut)
    with monkeypatch.context() as context:
        context.setattr("tasks.engine.remote.PATIENCE", 0)
        with pytest.raises(TemporaryError, match=f"store_uri {uri}: OSError: the line is cut"):
            remote.push(tmp_path / "source", "kind/file")
    assert remote.contents() == {}
    cuts = iter([True])
    remote.push(tmp_path / "source", "kind/file")
    assert remote.sizes("kind") == {"file": 5}, "the second attempt succeeds"


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(28, "No space left on device")])
def test_what_no_attempt_mends_is_not_tried_again(
    error: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = []

    def fail(*_: object, **__: object) -> None:
        attempts.append(1)
        raise error

    monkeypatch.setattr("tasks.engine.remote.shutil.copyfileobj", fail)
    (tmp_path / "source").write_bytes(b"12345")
    with pytest.raises(UserError, match=f"store_uri file://.*{error.strerror}.*free some space"):
        Remote(f"file://{tmp_path}/shared").push(tmp_path / "source", "kind/file")
    assert len(attempts) == 1


@pytest.mark.parametrize("uri", ["nosuch://bucket/x", "s3a+x://bucket"])
def test_an_address_that_nobody_knows(uri: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="store_uri"):
        Store(tmp_path, uri).remote  # noqa: B018, reading it is the error


@pytest.mark.usefixtures("prefect_server")
def test_what_one_has_computed_another_does_not(uri: str, tmp_path: Path) -> None:
    origin, other, third = (Store(tmp_path / name, uri) for name in ("origin", "other", "third"))
    assert runs(origin) == ["first", "second"]
    assert runs(other) == []
    files, root = fsspec.url_to_fs(uri)
    (copy,) = files.find(f"{root}/copy")
    files.pipe_file(copy, b"7")
    assert runs(third) == ["second"], "damaged on the way"
    assert runs(Store(tmp_path / "fourth", uri)) == [], "mended there as well"
    files.rm(copy)
    with planning() as plan:
        run_chain.fn(Store(tmp_path / "fifth", uri))
    assert [state for _, state in plan.stages] == ["cached", "to run"]
    ran.clear()


@pytest.mark.usefixtures("prefect_server")
def test_a_store_can_be_moved_and_its_records_name_no_place(tmp_path: Path) -> None:
    store = Store(tmp_path / "here")
    runs(store)
    for record in store.results.iterdir():
        assert str(tmp_path) not in json.loads(record.read_text())["result"]
    moved = store.root.rename(tmp_path / "there")
    assert runs(Store(moved)) == []


@pytest.mark.usefixtures("prefect_server", "in_this_process")
def test_a_second_machine_finds_the_whole_run(make_preset: Callable[..., str], workplace: Path) -> None:
    preset, uri = make_preset(), f"file://{workplace}/shared"

    def on_machine(name: str) -> dict[str, str]:
        return {"store": str(workplace / name), "store_uri": uri}

    finetuned = finetune(preset, "grit", Overrides.model_validate(on_machine("one")))
    assert isinstance(finetuned, Finetuned)
    with planning() as plan:
        stages(load_settings(preset, {"method": "grit", **on_machine("two")}))
    assert "to run" not in {state for _, state in plan.stages}
    again = finetune(preset, "grit", Overrides.model_validate(on_machine("two")))
    assert again.gguf.is_whole() and again.gguf.path.is_relative_to(workplace / "two")
    assert again.gguf.digest == finetuned.gguf.digest
    skipped = finetune(preset, "grit", Overrides.model_validate(on_machine("three")), True, return_state=True)
    assert skipped.name == "Skipped"
