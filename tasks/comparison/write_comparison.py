"""Stage: one HTML file that says which method is better, with its data as JSON and a short Markdown."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.analysis.compared_runs import BaseFigures, ComparedRun, FaultRun, RateTrial
from tasks.analysis.methods import at_rate, settings_of, settings_that_differ
from tasks.engine.artifacts import Artifact, Store
from tasks.engine.stage import stage
from tasks.evaluation.answering import read_answers
from tasks.report.rendering import flat_settings, jinja, template_files
from tasks.settings.comparison import FAULT, ComparedMethod, CompareSettings
from tasks.settings.finetune import FinetuneSettings
from tasks.stats.json_files import read_json

if TYPE_CHECKING:
    from tasks.analysis.metric import Runs

SAMPLES = 4
"""Prompts whose answers are shown side by side."""


@stage(
    libraries=("matplotlib", "jinja2", "scipy", "numpy"),
    templates=template_files("comparison"),
)
def write_comparison(
    settings: FinetuneSettings,
    *,
    comparison: CompareSettings,
    model: Artifact,
    dataset: Artifact,
    base: BaseFigures,
    trials: tuple[RateTrial, ...],
    runs: tuple[ComparedRun, ...],
    faults: tuple[FaultRun, ...],
    not_run: dict[str, str],
    store: Store,
) -> Artifact:
    """Compare methods and write it down.

    Args:
        settings: shared by all methods.
        comparison: what was asked for.
        model: the base model.
        dataset: the data card.
        base: what was measured of the base model.
        trials: of each method's learning rate; the best one's is that of its runs.
        runs: all trainings, by seed and then by method.
        faults: reproductions of the study's faults.
        not_run: methods that were asked for and have no figures, with the reason.
        store: where the artifact goes.

    Returns:
        The artifact `comparison`: `report.html`, `report.json`, `report.md`, and `tensorboard/METHOD/seed-SEED/`.
    """
    from tasks.analysis.provenance import by_machine, origins
    from tasks.analysis.study_comparison import fault_summary

    methods = [method for method in comparison.methods if any(run.method == method for run in runs)]
    by_method: Runs = {method: [run for run in runs if run.method == method] for method in methods}
    own = _settings_by_method(settings, methods, trials)
    machines = by_machine(runs)
    data: dict[str, Any] = {
        "title": f"{' against '.join(reversed(methods))} on {settings.model.name}",
        "methods": methods,
        "seeds": [run.seed for run in by_method[methods[0]]],
        "confidence": comparison.confidence,
        "not_run": not_run,
        **_figures(by_method, base, comparison.confidence, same_machine=len(machines) == 1),
        "fault": fault_summary(faults, by_method),
        "samples": _samples(by_method, base),
        **_trained_how(runs, own, trials),
        "machines": machines,
        "settings_that_differ": settings_that_differ(own),
        "settings": own[methods[0]].model_dump(mode="json"),
        "comparison": comparison.model_dump(mode="json", exclude={"cluster"}),  # it changes no figure
        "card": read_json(dataset.path / "card.json"),
        "runs": [run.history.facts | {"method": run.method, "seed": run.seed} for run in runs],
        "provenance": origins(runs, [("model", model), ("dataset", dataset)], base),
    }
    view = {
        **data,
        **_pictures(by_method, faults, settings.training.eval_tokens),
        **_only_shown(data["table"], comparison, methods),
        "flat_settings": list(flat_settings(own[methods[0]])),
        "sources": {"data": settings.data.source, "steps": settings.training.max_steps},
    }
    with store.draft("comparison") as draft:
        for name in ("html", "md"):
            text = jinja().get_template(f"comparison.{name}.j2").render(view)
            (draft.path / f"report.{name}").write_text(text, encoding="utf-8")
        text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
        (draft.path / "report.json").write_text(text + "\n", encoding="utf-8")
        _copy_events(draft.path / "tensorboard", runs=runs, faults=faults, trials=trials)
        draft.facts = {"verdict": data["verdict"]["text"]}
    return draft.done()


def _settings_by_method(
    settings: FinetuneSettings, methods: Sequence[ComparedMethod], trials: Sequence[RateTrial]
) -> dict[ComparedMethod, FinetuneSettings]:
    """What each method was trained with: at the rate that it chose, where some were tried."""
    from tasks.analysis.learning_rates import chosen_rate

    own = {method: settings_of(method, settings) for method in methods}
    return {method: at_rate(own[method], chosen_rate(trials, method)) for method in methods} if trials else own


def _figures(by_method: Runs, base: BaseFigures, confidence: float, *, same_machine: bool) -> dict[str, Any]:
    """Which method is better, and in what: verdict, table, the study beside it, and wins by answers."""
    from tasks.analysis.all_metrics import all_metrics
    from tasks.analysis.answer_metrics import wins
    from tasks.analysis.study_comparison import published_rows
    from tasks.analysis.table import comparable, reading, table
    from tasks.analysis.verdict import verdict

    methods = list(by_method)
    metrics = comparable(all_metrics(by_method, base), same_machine=same_machine)
    rows = table(metrics, methods, confidence)
    return {
        "verdict": verdict(metrics, methods, confidence),
        "table": rows,
        "published": published_rows(rows),
        "wins": [
            row
            | {name: row[name].__dict__ for name in ("win", "tie", "loss", "net")}
            | {"reading": reading(row["net"], "higher")}
            for row in wins(by_method, confidence)
        ],
    }


def _samples(by_method: Runs, base: BaseFigures) -> list[dict[str, Any]]:
    """What the base model and each method's first run answered to the first prompts."""
    of_base = read_answers(base.answers)
    answers = {"base": of_base} | {method: read_answers(runs[0].answers) for method, runs in by_method.items()}
    return [
        {
            "prompt": line["prompt"],
            "expected": line["expected"],
            "answers": {name: lines[index]["answer"] for name, lines in answers.items()},
        }
        for index, line in enumerate(of_base[:SAMPLES])
    ]


def _trained_how(
    runs: Sequence[ComparedRun], own: Mapping[ComparedMethod, FinetuneSettings], trials: Sequence[RateTrial]
) -> dict[str, Any]:
    """The learning rates that were tried, and what a reader must know of single trainings."""
    from tasks.analysis.learning_rates import edge_sentence, trial_rows
    from tasks.analysis.provenance import batch_notes, choice_notes

    rows = trial_rows(trials, list(own))
    return {"trials": rows, "edge": edge_sentence(rows), "notes": batch_notes(runs, own) + choice_notes(own)}


def _pictures(by_method: Runs, faults: Sequence[FaultRun], every: int | None) -> dict[str, Any]:
    """Curves over tokens and over seconds, GRIT's modules, and the fault's curve."""
    from tasks.analysis import figures
    from tasks.analysis.module_maps import module_maps

    reference = next(iter(by_method.values()))
    validated = all(run.history.facts["validation"] for runs in by_method.values() for run in runs)
    return {
        "curves": {
            over: [figures.loss_curves(by_method, over, every)]
            + ([figures.validation_curves(by_method, over, every)] if validated else [])
            for over in ("tokens", "seconds")
        },
        "maps": module_maps(by_method),
        "fault_curve": figures.fault_curves(faults[0], reference[0]) if faults else None,
    }


def _only_shown(
    rows: Sequence[Mapping[str, Any]], comparison: CompareSettings, methods: Sequence[str]
) -> dict[str, Any]:
    """What the pages need beside the data."""
    from tasks.analysis.labels import GROUPS, READINGS
    from tasks.analysis.metric import shared_confidence
    from tasks.analysis.published_study import SETUP

    asked = comparison.model_dump(exclude={"cluster"})
    return {
        "groups": [(key, words, [row for row in rows if row["group"] == key]) for key, words in GROUPS.items()],
        "compared": [(name, value) for name, value in flat_settings(comparison) if name in asked],
        "study_setup": SETUP,
        "readings": READINGS,
        "shared": shared_confidence(comparison.confidence, len(methods) - 1),
        "takes_turns": comparison.cluster is None,
    }


def _copy_events(
    root: Path, *, runs: Sequence[ComparedRun], faults: Sequence[FaultRun], trials: Sequence[RateTrial]
) -> None:
    """TensorBoard's files of all trainings, a directory each."""
    histories = {f"{_directory(run.method)}/seed-{run.seed}": run.history for run in runs}
    histories |= {f"{FAULT}/seed-{fault.seed}": fault.history for fault in faults}
    histories |= {
        f"{_directory(trial.method)}/rate-{trial.learning_rate}": trial.history for trial in trials if trial.history
    }
    for name, history in histories.items():
        shutil.copytree(history.path / "tensorboard", root / name)


def _directory(method: str) -> str:
    return method.replace(":", "-")
