"""Stores that an earlier version has written: what is read, what stays, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from flows.prune import run
from tasks.engine.artifacts import Store
from tasks.engine.errors import UserError
from tasks.engine.journal import append, entries
from tasks.engine.planning import Plan
from tasks.engine.stage import cached_result
from tasks.ollama.tag_history import TAGS, TagRecord
from tasks.runs.finished import COMPARISONS, RUNS, FinishedRun, finished_runs, remember
from tasks.runs.pruning import find_waste, kept_runs
from tests.support.made_artifacts import make

KEY = f"convert-{'0' * 64}"


def record(day: int, model: str = "it", **more: Any) -> dict[str, Any]:
    """A finished run as the first versions wrote it: without `registration`."""
    return {
        "at": f"2026-11-{day}T02:10:00.123456Z", "model": model, "target": "store", "gguf_sha256": f"{day:064}",
        "keys": [KEY], "artifacts": [f"gguf/{day:016}"], "settings": {"seed": day, "evaluation": {"tasks": []}},
    } | more  # fmt: skip


def write(store: Store, name: str, content: object) -> Path:
    path = store.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def older_run(store: Store, day: int) -> Path:
    """A run's model, and its record under the name of the first versions: a date and no number."""
    write(store, f"gguf/{day:016}/model.gguf", day)
    return write(store, f"{RUNS}/2026-11-{day}T02-10-00-1a2b3c4d.json", record(day))


def age(store: Store, days: int = 2) -> None:
    for path in sorted(store.root.rglob("*"), reverse=True):
        before = path.stat().st_mtime - 86400 * days
        os.utime(path, (before, before))


def test_runs_without_a_number_are_read_and_older_than_those_with_one(store: Store) -> None:
    for day in (23, 24):
        older_run(store, day)
    registration = make(store, "registration", {"name": "it", "target": "store", "gguf_sha256": "f" * 64})
    remember(store, Plan(), registration, {"seed": 25})
    assert [run.settings["seed"] for _, run in finished_runs(store)] == [25, 24, 23]
    assert [run.settings["seed"] for run in kept_runs(store, 2)] == [25, 24]


def test_what_an_older_run_has_made_stays_as_long_as_its_record_is_kept(store: Store) -> None:
    for day in (22, 23, 24):
        older_run(store, day)
    age(store)
    assert find_waste(store, keep=3, hours=1) == []
    gone = {waste.name for waste in find_waste(store, keep=2, hours=1)}
    assert gone == {f"{RUNS}/2026-11-22T02-10-00-1a2b3c4d.json", f"gguf/{22:016}"}


@pytest.mark.parametrize("content", [{"at": "2031-01-01T00:00:00Z", "written_by": 9}, "cut"])
@pytest.mark.parametrize("journal", [RUNS, COMPARISONS, TAGS])
def test_nothing_is_removed_while_a_record_cannot_be_read(
    journal: str, content: object, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    """A later version's, or a damaged one: nobody knows what it names."""
    for day in (22, 23):
        older_run(store, day)
    unreadable = write(store, f"{journal}/000007-2031-01-01T00-00-00-1a2b3c4d.json", content)
    age(store)
    before = sorted(store.root.rglob("*"))
    command = ["--store", str(store.root), "--keep", "1", "--yes"]
    assert run(command) == 2
    assert sorted(store.root.rglob("*")) == before
    message = capsys.readouterr().err
    assert message.startswith(f"error: {unreadable}: this version cannot read the record") and message.count("\n") == 1
    unreadable.unlink()
    assert run(command) == 0
    assert not (store.root / f"gguf/{22:016}").exists() and (store.root / f"gguf/{23:016}").exists()


def test_a_record_that_cannot_be_read_stops_no_run(store: Store) -> None:
    older_run(store, 23)
    write(store, f"{RUNS}/000007-2031-01-01T00-00-00-1a2b3c4d.json", {"written_by": 9})
    assert [run.settings["seed"] for _, run in finished_runs(store)] == [23]
    append(store, RUNS, FinishedRun.model_validate(record(25)))
    newest, _ = next(finished_runs(store))
    assert newest.name.startswith("002027-"), "above every number, also those that are years"


def test_what_a_later_version_adds_to_a_record_is_passed_over(store: Store) -> None:
    write(store, f"{RUNS}/000001-2031-01-01T00-00-00-1a2b3c4d.json", record(23, host="elsewhere"))
    assert [run.model for _, run in finished_runs(store)] == ["it"]


def test_a_result_of_a_class_that_has_moved_counts_as_none(store: Store) -> None:
    """Its key differs as well; it must not stop those who look through all results."""
    artifact = {"kind": "gguf", "path": "gguf/1a2b", "files": {}, "size": 0, "facts": {}}
    for name, taken in (("tasks.artifacts.Artifact", False), ("tasks.engine.artifacts.Artifact", True)):
        result = json.dumps({"__class__": name, "data": artifact})
        serializer = {"type": "json"}
        metadata = {"storage_key": KEY, "expiration": None, "serializer": serializer, "prefect_version": "3.8.8"}
        write(store, f"results/{KEY}", {"metadata": metadata, "result": result})
        assert (cached_result(store, KEY) is not None) is taken
    age(store)
    assert [waste.name for waste in find_waste(store, keep=1, hours=1)] == [f"results/{KEY}"]


def test_judgements_without_keys_are_read(store: Store) -> None:
    """Checks had four values; rollback and the rule of promotion read the history by its digests."""
    check = ["mean KL divergence", "0.3", "at most 0.1", "failed"]
    judged = {
        "at": "2026-11-25T02:10:00Z", "event": "judged", "place": "/models", "name": "it:latest",
        "version": "it:2026-11-25-1a2b3c4d", "digest": "1" * 64, "in_use": "2" * 64, "checks": [check],
    }  # fmt: skip
    write(store, f"{TAGS}/000001-2026-11-25T02-10-00-1a2b3c4d.json", judged)
    ((_, read),) = entries(store, TAGS, TagRecord)
    assert (read.checks[0].name, read.checks[0].reading, read.checks[0].key) == (check[0], "failed", "")
    assert find_waste(store, keep=1, hours=1) == []


def test_pruning_a_store_says_which_record_at_the_address_too(store: Store, tmp_path: Path) -> None:
    shared = Store(store.root, f"file://{tmp_path}/shared")
    write(Store(tmp_path / "shared"), f"{RUNS}/000001-2031-01-01T00-00-00-1a2b3c4d.json", {"written_by": 9})
    with pytest.raises(UserError, match="000001-2031.* delete the file, here and at `store_uri`:"):
        find_waste(shared, keep=1, hours=1)
