"""Where a comparison's figures come from: date, commit, the machine of each training, versions, digests."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tasks.analysis.compared_runs import BaseFigures, ComparedRun
from tasks.engine.artifacts import Artifact
from tasks.engine.paths import REPOSITORY
from tasks.report.rendering import provenance
from tasks.settings.finetune import FinetuneSettings

GIT_SECONDS = 10


def origins(
    runs: Sequence[ComparedRun], shared: Sequence[tuple[str, Artifact]], base: BaseFigures
) -> list[tuple[str, str]]:
    """Names and values of the provenance.

    Args:
        runs: all trainings.
        shared: artifacts that all of them start from, by name.
        base: what was measured of the base model, for what it was measured on.
    """
    others = [("second data set", base.second)] if base.second else []
    models = [
        (f"{run.method}, seed {run.seed}: {artifact.kind}", artifact)
        for run in runs
        for artifact in (run.adapter, run.gguf)
    ]
    here = provenance(runs[0].history.facts["device"], [*shared, *models])
    machines = by_machine(runs)
    return [
        ("written", datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")),
        ("commit", commit(REPOSITORY) or "no git checkout"),
        *(
            (f"machine of {'all trainings' if len(machines) == 1 else '; '.join(trained)}", machine)
            for machine, trained in machines.items()
        ),
        ("system", "; ".join(sorted({_system(run) for run in runs}))),
        *here[1:],  # the first is the machine that writes this
        *(
            (f"{name} SHA-256", measured.facts["of_sha256"])
            for name, measured in [*others, ("text outside the data", base.forgetting)]
        ),
    ]


def by_machine(runs: Sequence[ComparedRun]) -> dict[str, list[str]]:
    """Which runs were trained on which machine: names of runs, by what is known of the machine.

    Two machines of the same kind count as one, and so does one with a new system.
    """
    trained: dict[str, list[str]] = {}
    for run in runs:
        trained.setdefault(_machine(run.history.facts.get("machine")), []).append(f"{run.method}, seed {run.seed}")
    return trained


def _machine(facts: dict[str, Any] | None) -> str:
    if not facts:
        return "not known"
    memory = f"{facts['memory_bytes'] / 2**30:.0f} GiB of memory" if facts.get("memory_bytes") else None
    parts = (facts.get("processor"), f"{facts.get('cores')} cores", memory, facts.get("device"))
    return ", ".join(str(part) for part in parts if part)


def _system(run: ComparedRun) -> str:
    return str((run.history.facts.get("machine") or {}).get("system", "not known"))


def batch_notes(runs: Sequence[ComparedRun], methods: Mapping[Any, FinetuneSettings]) -> list[str]:
    """A sentence for each training that ran out of memory and went on with smaller micro-batches.

    Args:
        runs: all trainings.
        methods: the settings of each method.
    """
    notes = []
    for run in runs:
        training, facts = methods[run.method].training, run.history.facts
        asked = training.per_device_batch_size, training.gradient_accumulation_steps
        used = facts.get("per_device_batch_size", asked[0]), facts.get("gradient_accumulation_steps", asked[1])
        if used != asked:
            notes.append(
                f"{run.method}, seed {run.seed}: memory ran out, so it trained on {used[0]} × {used[1]} rows a step in "
                f"place of {asked[0]} × {asked[1]}: the same batch, but other times and another peak of memory."
            )
    return notes


def choice_notes(methods: Mapping[Any, FinetuneSettings]) -> list[str]:
    """A sentence where the rows of the verdict have chosen what it measures.

    Args:
        methods: the settings of each method.
    """
    if not any(settings.training.keep_best for settings in methods.values()):
        return []
    return [
        "Each adapter is that of its training's lowest validation loss (training.keep_best), on the rows of the "
        "table's validation loss: what is lowest of several is lower than it would be on rows that have chosen nothing."
    ]


def commit(checkout: Path) -> str | None:
    """The commit that is checked out, and whether tracked files differ from it; none where git does not tell."""
    git = shutil.which("git")
    if git is None or not (checkout / ".git").exists():
        return None
    try:
        head, changes = (
            subprocess.run(
                [git, "-C", str(checkout), *words], capture_output=True, text=True, check=True, timeout=GIT_SECONDS
            ).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}{' with uncommitted changes' if changes else ''}"
