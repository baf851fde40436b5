"""What of the store is no longer needed: all that neither the newest finished runs nor anything of late has used."""

from __future__ import annotations

import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tasks.engine.artifacts import Store, artifacts_in
from tasks.engine.journal import insist_on_all
from tasks.engine.stage import cached_result
from tasks.ollama.tag_history import TAGS, TagRecord, ggufs_in_use
from tasks.runs.finished import (
    COMPARISONS,
    RUNS,
    FinishedComparison,
    FinishedRun,
    finished_comparisons,
    finished_runs,
)

NO_ARTIFACTS = {RUNS, COMPARISONS, TAGS, "results", "locks", "ollama"}
"""Directories of the store that are looked at in another way, or not at all."""
LEFT_BEHIND = {"drafts": "left by a killed run", "checkpoints": "training that was not gone on with", "logs": "log"}
"""Why something in such a directory can go."""
NOT_NEEDED = "no finished run that is kept needs it"
"""Why anything else can go."""


@dataclass(frozen=True)
class Waste:
    """Something to remove."""

    name: str
    """Path below the store."""
    bytes: int
    why: str
    at_uri: bool = False
    """Whether it is at the store's URI, not on this machine."""


def kept_runs(store: Store, keep: int) -> list[FinishedRun]:
    """The newest finished runs: one of each GGUF, so many GGUFs of each Ollama model, and always the one in use."""
    in_use = ggufs_in_use(store)
    by_model: dict[str, dict[str, FinishedRun]] = defaultdict(dict)
    for _, run in finished_runs(store):
        by_model[run.model].setdefault(run.gguf_sha256, run)
    return [
        run
        for runs in by_model.values()
        for number, (sha256, run) in enumerate(runs.items())
        if number < keep or sha256 in in_use
    ]


def kept_comparisons(store: Store, keep: int) -> list[FinishedComparison]:
    """The newest finished comparisons, one of each report."""
    by_report: dict[str, FinishedComparison] = {}
    for _, comparison in finished_comparisons(store):
        by_report.setdefault(comparison.report, comparison)
    return list(by_report.values())[:keep]


def find_waste(store: Store, keep: int, hours: float) -> list[Waste]:
    """List what can go.

    What was used within the last hours stays, since a run that has not ended may need it. Of what is at the URI alone,
    nobody knows when it was used, only when it was written; a run elsewhere that needs it has a copy of its own.

    Args:
        store: what is looked through, on this machine and at its URI.
        keep: how many models of each name stay, with all that the newest run that made one has used; and how many
            comparisons.
        hours: how long ago something must have been used last.

    Raises:
        UserError, TemporaryError: a record, or what is at the URI, cannot be read.
    """
    insist_on_all(store, RUNS, FinishedRun)
    insist_on_all(store, COMPARISONS, FinishedComparison)
    insist_on_all(store, TAGS, TagRecord)
    before = time.time() - 3600 * hours
    kept: list[FinishedRun | FinishedComparison] = [*kept_runs(store, keep), *kept_comparisons(store, keep)]
    finished = [*finished_runs(store), *finished_comparisons(store)]
    results = _split_results(store, {key for run in kept for key in run.keys}, before)
    needed = {
        *_needed_by_runs(store, kept),
        *_needed_by_results(store, results.needed),
        *(_name(store, path) for path, run in finished if run in kept),
    }
    former_records = [_waste(store, path, "record of a former run") for path, run in finished if run not in kept]
    return [
        *(_waste(store, result, "result of a former run") for result in results.former),
        *former_records,
        *_unused_artifacts(store, needed, before),
        *_unused_at_uri(store, needed, {record.name for record in former_records}, before),
    ]


def remove(store: Store, waste: list[Waste]) -> None:
    """Remove it; records first, so that nothing refers to what is gone."""
    records = {RUNS, COMPARISONS, store.results.name}
    for leftover in sorted(waste, key=lambda leftover: leftover.name.partition("/")[0] not in records):
        path = store.root / leftover.name
        if leftover.at_uri and store.remote:
            store.remote.remove(leftover.name)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


class _Results(NamedTuple):
    """Cached results on this machine."""

    needed: list[Path]
    former: list[Path]


def _split_results(store: Store, keys: set[str], before: float) -> _Results:
    """Which results are still needed: those under a kept run's keys, and those that were used of late."""
    results = _Results([], [])
    for result in sorted(store.results.glob("*")):
        still = result.name in keys or result.stat().st_mtime >= before
        (results.needed if still else results.former).append(result)
    return results


def _needed_by_runs(store: Store, runs: list[FinishedRun | FinishedComparison]) -> Iterator[str]:
    """What kept runs have used and made, and the results that say so: paths below the store, here or at its URI."""
    for run in runs:
        yield from run.artifacts
        yield from (f"{store.results.name}/{key}" for key in run.keys)


def _needed_by_results(store: Store, results: list[Path]) -> Iterator[str]:
    """Results and their artifacts, as paths below the store; a result that cannot be read has none."""
    for path in results:
        yield _name(store, path)
        if (result := cached_result(store, path.name)) is not None:
            yield from (store.portable(artifact).path.as_posix() for artifact in artifacts_in(result))


def _unused_artifacts(store: Store, needed: set[str], before: float) -> Iterator[Waste]:
    """Which artifacts, drafts, checkpointed trainings and logs on this machine can go."""
    for path in _contents(store):
        # A training writes into several drafts, at each step into one of them.
        used = _newest(path.parent if path.parent.name == "drafts" else path)
        if _name(store, path) not in needed and used < before:
            yield _waste(store, path, LEFT_BEHIND.get(path.parent.name, NOT_NEEDED))


def _unused_at_uri(store: Store, needed: set[str], former_records: set[str], before: float) -> Iterator[Waste]:
    """What can go at the store's URI: what is not needed and old enough, and at once the records that go here."""
    for name, (size, written) in (store.remote.contents() if store.remote else {}).items():
        unused = name not in needed and written < before and not name.startswith(f"{TAGS}/")
        if name in former_records or unused:
            yield Waste(name, size, NOT_NEEDED, at_uri=True)


def _contents(store: Store) -> Iterator[Path]:
    """Every artifact, draft, checkpointed training and log."""
    for directory in sorted(store.root.iterdir() if store.root.is_dir() else ()):
        if directory.is_dir() and directory.name not in NO_ARTIFACTS:
            yield from sorted(path for path in directory.iterdir() if path.suffix != ".lock")


def _waste(store: Store, path: Path, why: str) -> Waste:
    return Waste(_name(store, path), sum(file.stat().st_size for file in _files(path)), why)


def _name(store: Store, path: Path) -> str:
    return path.relative_to(store.root).as_posix()


def _newest(path: Path) -> float:
    return max((file.stat().st_mtime for file in [path, *_files(path)]), default=0.0)


def _files(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
