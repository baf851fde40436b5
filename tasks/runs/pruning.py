"""What of the store is no longer needed: all that neither the newest finished runs nor anything of late has used."""

from __future__ import annotations

import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tasks.engine.artifacts import Store, artifacts_in
from tasks.engine.stage import cached_result
from tasks.ollama.tag_history import TAGS, ggufs_in_use
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
        UserError, TemporaryError: what is at the URI cannot be read.
    """
    before = time.time() - 3600 * hours
    runs: list[FinishedRun | FinishedComparison] = [*kept_runs(store, keep), *kept_comparisons(store, keep)]
    needed = {name for run in runs for name in run.artifacts}
    keys = {key for run in runs for key in run.keys}
    waste = []
    for record in sorted(store.results.glob("*")):
        if record.name in keys or record.stat().st_mtime >= before:
            result = cached_result(store, record.name)
            made = artifacts_in(result) if result is not None else ()
            needed |= {record.relative_to(store.root).as_posix()}
            needed |= {store.portable(artifact).path.as_posix() for artifact in made}
        else:
            waste.append(_waste(store, record, "result of a former run"))
    for path, run in (*finished_runs(store), *finished_comparisons(store)):
        if run in runs:
            needed.add(path.relative_to(store.root).as_posix())
        else:
            waste.append(_waste(store, path, "record of a former run"))
    for path in _contents(store):
        # A training writes into several drafts, at each step into one of them.
        used = _newest(path.parent if path.parent.name == "drafts" else path)
        if path.relative_to(store.root).as_posix() not in needed and used < before:
            waste.append(_waste(store, path, _why(path)))
    former = {one.name for one in waste if one.name.startswith((f"{RUNS}/", f"{COMPARISONS}/"))}
    needed |= {f"{store.results.name}/{key}" for key in keys}
    for name, (size, written) in (store.remote.contents() if store.remote else {}).items():
        if name in former or (name not in needed and written < before and not name.startswith(f"{TAGS}/")):
            waste.append(Waste(name, size, "no finished run that is kept needs it", at_uri=True))
    return waste


def remove(store: Store, waste: list[Waste]) -> None:
    """Remove it; records first, so that nothing refers to what is gone."""
    for one in sorted(waste, key=lambda one: not one.name.startswith((RUNS, COMPARISONS, store.results.name))):
        path = store.root / one.name
        if one.at_uri and store.remote:
            store.remote.remove(one.name)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _contents(store: Store) -> Iterator[Path]:
    """Every artifact, draft, checkpointed training and log."""
    for directory in sorted(store.root.iterdir() if store.root.is_dir() else ()):
        if directory.is_dir() and directory.name not in NO_ARTIFACTS:
            yield from sorted(path for path in directory.iterdir() if path.suffix != ".lock")


def _why(path: Path) -> str:
    known = {"drafts": "left by a killed run", "checkpoints": "training that was not gone on with", "logs": "log"}
    return known.get(path.parent.name, "no finished run that is kept needs it")


def _waste(store: Store, path: Path, why: str) -> Waste:
    return Waste(path.relative_to(store.root).as_posix(), sum(file.stat().st_size for file in _files(path)), why)


def _newest(path: Path) -> float:
    return max((file.stat().st_mtime for file in [path, *_files(path)]), default=0.0)


def _files(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
