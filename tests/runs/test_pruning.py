"""What pruning takes and what it leaves, on real runs of the tests' small stages."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from prefect import flow

from flows.prune import run
from tasks.engine.artifacts import Store
from tasks.engine.planning import Plan, planning, recording
from tasks.runs.finished import finished_comparisons, finished_runs, remember, remember_comparison, same_run
from tests.support.chained_stages import chain, newest, ran, runs

DAY = 86400


def finish(store: Store, number: int, model: str = "grit") -> None:
    """A run that registers a model, as the flow leaves it."""

    def whole() -> None:
        with recording() as done:
            chain(store, number)
        with store.draft("registration") as draft:
            (draft.path / "registration.json").write_text(f'"{model}"')
            draft.facts = {"name": model, "target": "none", "gguf_sha256": f"{number:02}"}
        with store.draft("report") as report:
            (report.path / "report.html").write_text(f"{number} {model}")
        done.results += [("register", draft.done()), ("write_report", report.done())]
        remember(store, done, draft.done(), {"number": number})

    flow(whole, name="whole")()


def plan_of(store: Store, number: int) -> Plan:
    with planning() as plan:
        chain(store, number)
    return plan


def age(store: Store, days: float) -> None:
    """Make all that the store holds older, here and at its URI."""
    shared = Path(str(store.uri).removeprefix("file://"))
    for path in sorted([*store.root.rglob("*"), *shared.rglob("*")], reverse=True):
        before = path.stat().st_mtime - days * DAY
        os.utime(path, (before, before))


@pytest.fixture
def store(tmp_path: Path, prefect_server: None) -> Iterator[Store]:
    store = Store(tmp_path / "store", f"file://{tmp_path}/shared")
    yield store
    ran.clear()


def prune(store: Store, *arguments: str) -> int:
    return run(["--store", str(store.root), "--store_uri", store.uri or "null", *arguments])


def test_the_newest_runs_of_each_model_keep_all_they_need(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    finish(store, 1, "baseline")
    for number in (2, 3, 4):
        finish(store, number)
    age(store, 2)
    assert prune(store, "--keep", "2", "--yes") == 0
    assert "baseline, registered" in capsys.readouterr().out
    assert [run.settings["number"] for _, run in finished_runs(store)] == [4, 3, 1]
    again = Store(store.root.parent / "another machine", store.uri)
    for number, computed in ((1, []), (3, []), (4, []), (2, ["first", "second"])):
        assert runs(store, number) == computed
    assert runs(again, 4) == [], "at the URI too"
    assert len(list(store.root.glob("report/*"))) == 3


def compare(store: Store, number: int) -> None:
    """A comparison that has used a chain of stages."""

    def whole() -> None:
        with recording() as done:
            chain(store, number)
        with store.draft("comparison") as draft:
            (draft.path / "report.html").write_text(str(number))
        done.results.append(("write_comparison", draft.done()))
        remember_comparison(store, done, draft.done(), ("baseline", "grit"), "tiny")

    flow(whole, name="whole")()


def test_the_newest_comparisons_keep_all_they_need(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (1, 2, 2, 3):  # the second twice, which is one report
        compare(store, number)
    age(store, 2)
    assert prune(store, "--keep", "2", "--yes") == 0
    assert "kept: comparison of baseline, grit on tiny" in capsys.readouterr().out
    for number, computed in ((2, []), (3, []), (1, ["first", "second"])):
        assert runs(store, number) == computed
    assert len(list(store.root.glob("comparison/*"))) == 2
    assert len(list(finished_comparisons(store))) == 2
    age(store, 2)
    compare(store, 4)
    assert prune(store, "--keep", "1", "--yes") == 0
    assert [path.read_text() for path in store.root.glob("comparison/*/report.html")] == ["4"]


def test_what_was_used_of_late_stays(store: Store) -> None:
    runs(store, 1)
    runs(store, 2)
    age(store, 2)
    assert runs(store, 2) == [], "a run that has not ended found this cached"
    finish(store, 3)
    (store.root / "drafts/history-x").mkdir()
    (store.root / "drafts/adapter-y").mkdir()
    assert prune(store, "--yes") == 0
    assert runs(store, 2) == []
    assert (store.root / "drafts/adapter-y").is_dir()
    assert runs(store, 1) == ["first", "second"]


def test_what_killed_runs_have_left_goes(store: Store) -> None:
    finish(store, 1)
    for name in ("drafts/gguf-abc/model.gguf", "checkpoints/train-1/checkpoint-8/optimizer.pt", "logs/convert.log"):
        (store.root / name).parent.mkdir(parents=True, exist_ok=True)
        (store.root / name).write_text("x")
    age(store, 2)
    assert prune(store, "--yes") == 0
    assert not [path for path in store.root.rglob("*") if path.name in ("model.gguf", "optimizer.pt", "convert.log")]
    assert runs(store, 1) == []


def test_it_asks_first(store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    runs(store, 1)
    age(store, 2)
    for answer in ("n", ""):
        monkeypatch.setattr("builtins.input", lambda *_, answer=answer: answer)
        assert prune(store) == 0
        assert "no finished run that is kept needs it" in capsys.readouterr().out
    monkeypatch.setattr("builtins.input", lambda *_: (_ for _ in ()).throw(EOFError))
    assert prune(store) == 2
    assert "Use --yes" in capsys.readouterr().err
    assert runs(store, 1) == []
    assert prune(store, "--keep", "0") == 2
    assert "keep: Input should be greater than or equal to 1" in capsys.readouterr().err


def test_only_the_newest_run_of_a_model_tells_that_nothing_has_changed(store: Store) -> None:
    finish(store, 1)
    assert (former := same_run(store, plan_of(store, 1), "grit")) is not None
    assert former.settings == {"number": 1}
    assert same_run(store, plan_of(store, 1), "baseline") is None
    assert same_run(store, plan_of(store, 2), "grit") is None
    finish(store, 2)
    assert same_run(store, plan_of(store, 1), "grit") is None, "the name stands for another model now"
    assert same_run(store, plan_of(store, 2), "grit") is not None
    for path in store.root.glob("number/*/number.txt"):
        path.write_text("damaged")
    for path in Path(str(store.uri).removeprefix("file://")).glob("number/*/number.txt"):
        path.unlink()
    assert same_run(store, plan_of(store, 2), "grit") is None, "what it made is not whole"


def test_the_same_model_again_takes_no_other_ones_place(store: Store) -> None:
    for number in (1, 2, 2, 2):
        finish(store, number)
    age(store, 2)
    assert prune(store, "--keep", "2", "--yes") == 0
    assert [run.settings["number"] for _, run in finished_runs(store)] == [2, 1]
    assert runs(store, 1) == []


def test_what_is_at_the_address_alone_goes_by_its_age(store: Store, tmp_path: Path) -> None:
    other = Store(tmp_path / "other", store.uri)
    runs(other, 7)
    age(other, 2)
    runs(other, 8)
    finish(store, 1)
    assert prune(store, "--yes") == 0
    third = Store(tmp_path / "third", store.uri)
    assert runs(third, 8) == [], "another machine may be at it"
    assert runs(third, 7) == ["first", "second"]


def test_what_a_run_takes_up_while_nobody_answers_stays(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    runs(store, 1)
    runs(store, 2)
    age(store, 2)

    def answer(*_: object) -> str:
        assert runs(store, 1) == []
        return "y"

    monkeypatch.setattr("builtins.input", answer)
    assert prune(store) == 0
    assert runs(store, 1) == []
    assert runs(store, 2) == ["first", "second"]


def test_a_clock_that_was_set_back_changes_no_order(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(store, 1)

    monkeypatch.setattr("tasks.runs.finished.datetime", SimpleNamespace(now=lambda tz: datetime(2001, 1, 1, tzinfo=tz)))
    finish(store, 2)
    assert [run.settings["number"] for _, run in finished_runs(store)] == [2, 1]
    assert same_run(store, plan_of(store, 2), "grit") is not None


def test_what_changes_under_a_run_is_no_part_of_its_record(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    before = plan_of(store, 1).keys
    real = Store.new_file

    def later(self: Store, name: str) -> AbstractContextManager[Path]:
        monkeypatch.setitem(newest, "commit", "2")
        return real(self, name)

    monkeypatch.setattr(Store, "new_file", later)
    finish(store, 1)
    assert list(next(finished_runs(store))[1].keys)[:1] == before
    assert same_run(store, plan_of(store, 1), "grit") is None
