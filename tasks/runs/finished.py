"""What finished runs have made: so that a nightly run can tell that nothing has changed, and what must be kept."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tasks.engine.artifacts import Artifact, Store, artifacts_in
from tasks.engine.journal import append, entries
from tasks.engine.planning import Plan

RUNS, COMPARISONS = "runs", "comparisons"


class FinishedRun(BaseModel):
    """A run that ended with a registered model."""

    at: datetime
    """When it ended, in UTC."""
    model: str
    """The Ollama model's name."""
    target: str
    """Where it was registered: `server`, `store`, `none`."""
    gguf_sha256: str
    registration: str = ""
    """Path below the store of what was registered, with the Modelfile; the oldest records lack it."""
    keys: tuple[str, ...]
    """The cache key of each stage, in order; together they say what was asked for."""
    artifacts: tuple[str, ...]
    """What it used and made: paths below the store."""
    settings: dict[str, Any]
    """All settings."""


class FinishedComparison(BaseModel):
    """A comparison that ended with a report."""

    at: datetime
    """When it ended, in UTC."""
    methods: tuple[str, ...]
    """What was compared."""
    model: str
    """On which base model."""
    report: str
    """Path below the store."""
    keys: tuple[str, ...]
    """The cache key of each stage, in order."""
    artifacts: tuple[str, ...]
    """What it used and made: paths below the store."""


def remember(store: Store, done: Plan, registration: Artifact, settings: dict[str, Any]) -> None:
    """Record a finished run.

    Args:
        done: its stages.
        registration: what was registered.
    """
    run = FinishedRun(
        at=datetime.now(UTC),
        model=registration.facts["name"],
        target=registration.facts["target"],
        gguf_sha256=registration.facts["gguf_sha256"],
        registration=store.portable(registration).path.as_posix(),
        keys=tuple(done.keys),
        artifacts=_paths(store, done),
        settings=settings,
    )
    append(store, RUNS, run)


def remember_comparison(store: Store, done: Plan, report: Artifact, methods: tuple[str, ...], model: str) -> None:
    """Record a finished comparison.

    Args:
        done: its stages.
        report: what it ended with.
        methods: what was compared.
        model: the base model's name.
    """
    path, keys = store.portable(report).path.as_posix(), tuple(done.keys)
    record = FinishedComparison(
        at=datetime.now(UTC), methods=methods, model=model, report=path, keys=keys, artifacts=_paths(store, done)
    )
    append(store, COMPARISONS, record)


def _paths(store: Store, done: Plan) -> tuple[str, ...]:
    paths = sorted({store.portable(artifact).path for _, result in done.results for artifact in artifacts_in(result)})
    return tuple(path.as_posix() for path in paths if not path.is_absolute())


def finished_runs(store: Store) -> Iterator[tuple[Path, FinishedRun]]:
    """The records of finished runs with their files, newest first; one that cannot be read counts as none."""
    return entries(store, RUNS, FinishedRun)


def finished_comparisons(store: Store) -> Iterator[tuple[Path, FinishedComparison]]:
    """The records of finished comparisons with their files, newest first; one that cannot be read counts as none."""
    return entries(store, COMPARISONS, FinishedComparison)


def same_run(store: Store, plan: Plan, model: str) -> FinishedRun | None:
    """The run that made the Ollama model as it is, if another would make the very same; none if anything has changed.

    Args:
        store: where runs are recorded.
        plan: the stages as another run would find them.
        model: the Ollama model's name.
    """
    newest = next((run for _, run in finished_runs(store) if run.model == model), None)
    waiting = any(state == "to run" for _, state in plan.stages)
    return newest if newest and not waiting and newest.keys == tuple(plan.keys) else None
