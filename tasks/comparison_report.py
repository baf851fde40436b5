"""Stage: one HTML file that says which method is better, with its data as JSON and a short Markdown."""

from __future__ import annotations

import json
import shutil
from typing import Any

from tasks.answers import read_answers
from tasks.artifacts import Artifact, Store
from tasks.compared_runs import BaseFigures, ComparedRun, FaultRun, RateTrial
from tasks.comparison_settings import FAULT, CompareSettings, at_rate, settings_of, settings_that_differ
from tasks.settings import FinetuneSettings
from tasks.stage import stage

SAMPLES = 4
"""Prompts whose answers are shown side by side."""


@stage(
    libraries=("matplotlib", "jinja2", "scipy", "numpy"),
    templates=("comparison.html.j2", "comparison.md.j2", "style.css.j2"),
)
def write_comparison(
    settings: FinetuneSettings,
    comparison: CompareSettings,
    model: Artifact,
    dataset: Artifact,
    base: BaseFigures,
    trials: tuple[RateTrial, ...],
    runs: tuple[ComparedRun, ...],
    faults: tuple[FaultRun, ...],
    not_run: dict[str, str],
    *,
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
    from tasks import comparison_figures as pictures
    from tasks.comparison import Runs, wins
    from tasks.comparison_measures import measures
    from tasks.comparison_table import GROUPS, fault_summary, published_rows, table, verdict
    from tasks.rendering import flat_settings, jinja, provenance
    from tasks.study import SETUP

    methods = [method for method in comparison.methods if any(run.method == method for run in runs)]
    by_method: Runs = {method: [run for run in runs if run.method == method] for method in methods}
    confidence = comparison.confidence
    found = measures(by_method, base)
    rows = table(found, methods, confidence)
    first = by_method[methods[0]]
    own = {method: settings_of(method, settings) for method in methods}
    for method in methods if trials else ():
        best = min((trial for trial in trials if trial.method == method), key=lambda trial: trial.loss)
        own[method] = at_rate(own[method], best.learning_rate)
    answers = {"base": read_answers(base.answers)} | {m: read_answers(r[0].answers) for m, r in by_method.items()}
    data: dict[str, Any] = {
        "title": f"{' against '.join(reversed(methods))} on {settings.model.name}",
        "verdict": verdict(found, methods, confidence),
        "methods": methods,
        "seeds": [run.seed for run in first],
        "confidence": confidence,
        "not_run": not_run,
        "table": rows,
        "published": published_rows(rows),
        "wins": [row | {"net": row["net"].__dict__} for row in wins(by_method, confidence)],
        "fault": fault_summary(faults, by_method),
        "samples": [
            {
                "prompt": answers["base"][index]["prompt"],
                "expected": answers["base"][index]["expected"],
                "answers": {name: lines[index]["answer"] for name, lines in answers.items()},
            }
            for index in range(min(SAMPLES, len(answers["base"])))
        ],
        "trials": [
            trial.model_dump(include={"method", "learning_rate", "failure"})
            | {"loss": trial.loss if trial.history else None}
            for trial in trials
        ],
        "settings_that_differ": settings_that_differ(own),
        "settings": own[methods[0]].model_dump(mode="json"),
        "card": json.loads((dataset.path / "card.json").read_text(encoding="utf-8")),
        "runs": [run.history.facts | {"method": run.method, "seed": run.seed} for run in runs],
        "provenance": provenance(
            first[0].history.facts["device"],
            [
                ("model", model),
                ("dataset", dataset),
                *(
                    (f"{run.method}, seed {run.seed}: {one.kind}", one)
                    for run in runs
                    for one in (run.adapter, run.gguf)
                ),
            ],
        ),
    }
    measured = all(run.history.facts["validation"] for run in runs)
    view = {
        **data,
        "flat_settings": list(flat_settings(own[methods[0]])),
        "curves": {
            over: [pictures.loss_curves(by_method, over)]
            + ([pictures.validation_curves(by_method, over)] if measured else [])
            for over in ("tokens", "seconds")
        },
        "maps": pictures.module_maps(by_method),
        "fault_curve": pictures.fault_curves(faults[0], first[0]) if faults else None,
        "groups": [(group, [row for row in rows if row["group"] == group]) for group in GROUPS.values()],
        "study_setup": SETUP,
        "sources": {"data": settings.data.source, "steps": settings.training.max_steps},
    }
    with store.draft("comparison") as draft:
        for name in ("html", "md"):
            text = jinja().get_template(f"comparison.{name}.j2").render(view)
            (draft.path / f"report.{name}").write_text(text, encoding="utf-8")
        text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
        (draft.path / "report.json").write_text(text + "\n", encoding="utf-8")
        for run in runs:
            events = run.history.path / "tensorboard"
            shutil.copytree(events, draft.path / "tensorboard" / run.method.replace(":", "-") / f"seed-{run.seed}")
        for fault in faults:
            events = fault.history.path / "tensorboard"
            shutil.copytree(events, draft.path / "tensorboard" / FAULT / f"seed-{fault.seed}")
        for trial in trials:
            if trial.history:
                name = f"{trial.method.replace(':', '-')}/rate-{trial.learning_rate:g}"
                shutil.copytree(trial.history.path / "tensorboard", draft.path / "tensorboard" / name)
        draft.facts = {"verdict": data["verdict"]["text"]}
    return draft.done()
