from __future__ import annotations

from pathlib import Path

import pytest

from tasks.engine.artifacts import Artifact, Store, file_sha256


def make(store: Store, text: str = "a") -> Artifact:
    with store.draft("thing") as draft:
        (draft.path / "sub").mkdir()
        (draft.path / "one.txt").write_text(text)
        (draft.path / "sub/two.txt").write_text("b")
        draft.facts = {"n": 1}
    return draft.done()


def test_same_content_has_the_same_address(store: Store) -> None:
    first, second, other = make(store), make(store), make(store, "z")
    assert first == second
    assert first.path != other.path
    assert first.path.parent == store.root / "thing"
    assert first.files == {name: file_sha256(first.path / name) for name in ("one.txt", "sub/two.txt")}
    assert first.size == 2


@pytest.mark.parametrize("harm", ["delete", "truncate", "flip"])
def test_harm_is_noticed_and_repaired(store: Store, harm: str) -> None:
    artifact = make(store, "abc")
    file = artifact.path / "one.txt"
    if harm == "delete":
        file.unlink()
    else:
        file.write_text("ab" if harm == "truncate" else "abb")
    assert not artifact.is_whole()
    assert make(store, "abc") == artifact
    assert artifact.is_whole()


def test_a_failing_draft_leaves_nothing(store: Store) -> None:
    with pytest.raises(RuntimeError, match="half-way"), store.draft("thing") as draft:
        (draft.path / "one.txt").write_text("a")
        raise RuntimeError("half-way")
    assert [path for path in store.root.rglob("*") if path.is_file()] == []
    with pytest.raises(RuntimeError, match="not finished"):
        draft.done()


def test_artifact_survives_json(store: Store) -> None:
    artifact = make(store)
    again = Artifact.model_validate_json(artifact.model_dump_json())
    assert again == artifact and again.digest == artifact.digest and isinstance(again.path, Path)
