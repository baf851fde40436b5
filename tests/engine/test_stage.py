from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from prefect import flow
from prefect.context import TaskRunContext
from prefect.settings import PREFECT_API_URL

from tasks.engine.artifacts import Artifact, Store
from tasks.engine.errors import UserError
from tasks.engine.paths import REPOSITORY
from tasks.engine.planning import planning, without_prefect
from tasks.engine.stage import stage
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
from prefect.context import TaskRunContext
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
    outputs = [run.communicate(timeout=300) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert sorted(len(out.split()) for out, _ in outputs) == [1, 2], "one of them computes"
    assert len({out.split()[-1] for out, _ in outputs}) == 1
    assert sum("Waiting for another run, which computes the same: slow" in err for _, err in outputs) == 1


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
    assert plan.results[-1] == ("second", copy)


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


@stage(retries=2)
def networking(number: int, *, store: Store) -> Artifact:
    """Note how patient this task is."""
    return note_task(number, store)


@stage()
def computing(number: int, *, store: Store) -> Artifact:
    """Note how patient this task is, and how it is named."""
    return note_task(number, store)


def note_task(number: int, store: Store) -> Artifact:
    with store.draft("number") as draft:
        (draft.path / "number.txt").write_text(str(number))
        if context := TaskRunContext.get():
            task, delays = context.task, context.task.retry_delay_seconds
            assert isinstance(delays, list)
            draft.facts = {"retries": task.retries, "seconds": sum(delays), "name": context.task_run.name}
    return draft.done()


@flow(validate_parameters=False)
def on_both(number: int, store: Store) -> list[Artifact]:
    return [networking(number, store=store), computing(number, store=store)]


@pytest.mark.usefixtures("prefect_server")
def test_a_deployed_run_which_nobody_waits_for_tries_for_ten_minutes(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [artifact.facts["retries"] for artifact in on_both(1, store)] == [2, 0]
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", "a deployment")
    networked, computed = on_both(2, store)
    assert (networked.facts["retries"], networked.facts["seconds"]) == (6, 630)
    assert computed.facts["retries"] == 0, "what needs no network is not retried"


def without_facts(**arguments: object) -> str:
    watched.append(arguments)
    return ""


def still_there(result: Artifact, /, **arguments: object) -> bool:
    asked.append((result, arguments))
    return True


watched: list[dict[str, object]] = []
asked: list[tuple[Artifact, dict[str, object]]] = []


@stage(watch=without_facts, still=still_there)
def describe(model: Artifact, name: str = "it", *, store: Store) -> Artifact:
    """Note how the task run is named."""
    return note_task(len(name), store)


@pytest.mark.usefixtures("prefect_server")
def test_by_keyword_and_by_position_a_stage_is_the_same(store: Store) -> None:
    with store.draft("merged") as draft:
        (draft.path / "a.txt").write_text("a")
    model = draft.done()
    calls: list[Callable[[], Artifact]] = [
        lambda: describe(name="it", store=store, model=model),
        lambda: describe(model, "it", store=store),
        lambda: describe(model, store=store),
    ]
    results = flow(lambda: [call() for call in calls], name="three", validate_parameters=False)()
    assert results[0].facts["name"].startswith("describe (tuned) "), "by the first argument of the function"
    assert results[1:] == [results[0]] * 2
    assert watched == [{"model": model, "name": "it"}] * 3, "as one key is made of it for each call"
    assert asked == [(results[0], {"model": model, "name": "it"})] * 2, "of the cached result, not of the computed one"
    with planning() as plan:
        assert [call() for call in calls] == results
    assert len(set(plan.keys)) == 1
    with without_prefect():
        assert calls[0]().digest == calls[1]().digest == results[0].digest
    key = describe.key(store=store, model=model)
    assert key == plan.keys[0]
    assert describe.look_up(key, name="it", store=store, model=model) == results[0]


def test_a_stage_takes_a_store_and_the_arguments_of_its_function(store: Store) -> None:
    wrong: list[Callable[[], object]] = [
        lambda: first(1, LoraSettings(), store=store.root),
        lambda: first(1, LoraSettings()),  # type: ignore[call-arg]
        lambda: first(1, LoraSettings(), lora=LoraSettings(), store=store),
    ]
    for call in wrong:
        for look in (nullcontext(), planning(), without_prefect()):
            with look, pytest.raises(TypeError, match="store|lora"):
                call()


def test_the_key_covers_the_templates(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    templates = write_report.options.templates
    assert {path.name for path in templates} == {"report.html.j2", "report.md.j2", "style.css.j2"}
    assert all(path.is_file() for path in templates)
    template = tmp_path / "page.j2"
    template.write_text("one")
    monkeypatch.setattr(first, "options", replace(first.options, templates=(template,)))
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
