from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from prefect import flow
from prefect.settings import PREFECT_API_URL

from tasks.engine.artifacts import Artifact, Store
from tasks.engine.errors import UserError
from tasks.engine.paths import REPOSITORY
from tasks.engine.planning import planning, without_prefect
from tasks.engine.stage import stage
from tasks.fetch_data import fetch_data
from tasks.prepare_dataset import prepare_dataset
from tasks.settings.finetune import LoraSettings
from tasks.write_report import write_report
from tests.support.chained_stages import chain, first, newest, ran, run_chain, runs


@pytest.mark.usefixtures("prefect_server")
def test_a_stage_runs_again_only_for_what_decides_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert runs(store) == ["first", "second"]
    assert runs(store) == []
    assert runs(store, 3, LoraSettings(r=8)) == ["first"], "same bytes out: the next stage is a cache hit"
    assert runs(store, 4) == ["first", "second"]
    monkeypatch.setitem(newest, "commit", "2")
    assert runs(store) == ["first"]


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize("content", [b"", b"{", b"\x80\x04K\x01.", b'{"metadata": null, "result": "gASVBQ=="}'])
def test_a_damaged_record_counts_as_none(store: Store, content: bytes) -> None:
    runs(store)
    for record in store.results.iterdir():
        record.write_bytes(content)
    with planning() as plan:
        chain(store)
    assert [state for _, state in plan.stages] == ["to run", "to run"]
    assert runs(store) == ["first", "second"]
    assert runs(store) == []


@pytest.mark.usefixtures("prefect_server")
def test_damaged_artifacts_are_made_again_once(store: Store) -> None:
    copy = run_chain(store)
    (copy.path / "copy.txt").write_text("damaged")
    assert runs(store) == ["second"]
    assert runs(store) == []
    assert copy.is_whole()


SLOW = """
import sys, time
from pathlib import Path
from prefect import flow
from tasks.engine.artifacts import Artifact, Store
from tasks.engine.stage import stage

@stage()
def slow(number: int, *, store: Store) -> Artifact:
    with store.draft("slow") as draft:
        print("computing", flush=True)
        time.sleep(float(sys.argv[2]))
        (draft.path / "number.txt").write_text(str(number))
    return draft.done()

print(flow(lambda: slow(7, store=Store(Path(sys.argv[1]))), name="slow")().digest, flush=True)
"""


@pytest.fixture
def start(tmp_path: Path, prefect_server: None) -> Iterator[Callable[[float], subprocess.Popen[str]]]:
    """Starts runs of one and the same slow stage, in processes of their own, on the tests' server."""
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    environment = os.environ | {"PREFECT_API_URL": PREFECT_API_URL.value(), "PYTHONPATH": str(REPOSITORY)}
    with ExitStack() as stack:

        def go(seconds: float) -> subprocess.Popen[str]:
            command = [sys.executable, str(script), str(tmp_path / "store"), str(seconds)]
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)
            stack.callback(process.kill)
            return process

        yield go


def test_two_runs_at_once_compute_once(start: Callable[[float], subprocess.Popen[str]]) -> None:
    runs = [start(15), start(15)]
    said = [run.communicate(timeout=300) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert sorted(len(out.split()) for out, _ in said) == [1, 2], "one of them computes"
    assert len({out.split()[-1] for out, _ in said}) == 1
    assert sum("Waiting for another run, which computes the same: slow" in err for _, err in said) == 1


def test_a_killed_run_keeps_nobody_waiting(start: Callable[[float], subprocess.Popen[str]]) -> None:
    killed = start(1000)
    assert killed.stdout is not None and killed.stdout.readline() == "computing\n"
    killed.kill()
    out, err = start(0).communicate(timeout=300)
    assert out.startswith("computing\n") and "Waiting" not in err


@pytest.mark.usefixtures("prefect_server")
def test_plan_tells_what_would_run_and_runs_nothing(store: Store) -> None:
    ran.clear()
    with planning() as plan:
        chain(store)
    assert plan.stages == [("first", "to run"), ("second", "to run")]
    assert ran == []
    copy = run_chain(store)
    with planning() as plan:
        chain(store)
    assert plan.stages == [("first", "cached"), ("second", "cached")]
    assert plan.found[-1] == ("second", copy)


def test_without_prefect_stages_are_plain_functions(store: Store) -> None:
    ran.clear()
    with without_prefect():
        chain(store)
        chain(store)
    assert ran == ["first", "second"] * 2
    assert not store.results.exists()


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (httpx.ConnectError("no network"), 3),
        (ConnectionRefusedError("down"), 3),
        (UserError("wrong", where="here", fix="Mend it."), 1),
        (ValueError("a fault"), 1),
    ],
)
def test_only_temporary_failures_are_retried(error: Exception, attempts: int, store: Store) -> None:
    tried: list[int] = []

    @stage(retries=2)
    def fails(*, store: Store) -> Artifact:
        """Fail."""
        tried.append(1)
        raise error

    fails.task = fails.task.with_options(retry_delay_seconds=0)

    @flow
    def failing() -> None:
        fails(store=store)

    with pytest.raises(type(error)):
        failing()
    assert len(tried) == attempts


def test_a_deployed_run_which_nobody_waits_for_tries_for_ten_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "retries" not in fetch_data._options()
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", "a deployment")
    options = fetch_data._options()
    delays = options["retry_delay_seconds"](options["retries"])
    assert (len(delays), sum(delays)) == (6, 630)
    assert "retries" not in prepare_dataset._options(), "what needs no network is not retried"


def test_the_key_covers_the_templates(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {path.name for path in write_report.templates} == {"report.html.j2", "report.md.j2", "style.css.j2"}
    assert all(path.is_file() for path in write_report.templates)
    template = tmp_path / "page.j2"
    template.write_text("one")
    monkeypatch.setattr(first, "templates", (template,))
    before = first.key(1, LoraSettings(), store=store)
    template.write_text("two")
    assert first.key(1, LoraSettings(), store=store) != before


def test_the_engines_version_is_part_of_the_key(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    before = first.key(1, LoraSettings(), store=store)
    monkeypatch.setattr("tasks.engine.stage.ENGINE_VERSION", 1000)
    assert first.key(1, LoraSettings(), store=store) != before


def test_the_store_is_no_part_of_the_key(tmp_path: Path) -> None:
    keys = {first.key(1, LoraSettings(), store=Store(tmp_path / name)) for name in "ab"}
    assert len(keys) == 1
