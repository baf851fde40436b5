"""Stage: one HTML file that says which method is better, with its data as JSON and a short Markdown."""

from __future__ import annotations

import json
import shutil
from typing import Any

from tasks.analysis.compared_runs import BaseFigures, ComparedRun, FaultRun, RateTrial
from tasks.analysis.methods import at_rate, settings_of, settings_that_differ
from tasks.engine.artifacts import Artifact, Store
from tasks.engine.stage import stage
from tasks.evaluation.answering import read_answers
from tasks.report.rendering import flat_settings, jinja, template_files
from tasks.settings.comparison import FAULT, CompareSettings
from tasks.settings.finetune import FinetuneSettings

SAMPLES = 4
"""Prompts whose answers are shown side by side."""


@stage(
    libraries=("matplotlib", "jinja2", "scipy", "numpy"),
    templates=template_files("comparison"),
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
    from tasks.analysis import figures as pictures
    from tasks.analysis.all_measures import measures
    from tasks.analysis.learning_rates import chosen_rate, edge_sentence, trial_rows
    from tasks.analysis.measure import Runs, shared_confidence, wins
    from tasks.analysis.provenance import batch_notes, by_machine, choice_notes, origins
    from tasks.analysis.published_study import SETUP
    from tasks.analysis.study_comparison import fault_summary, published_rows
    from tasks.analysis.table import GROUPS, comparable, reading, table
    from tasks.analysis.verdict import verdict

    methods = [method for method in comparison.methods if any(run.method == method for run in runs)]
    by_method: Runs = {method: [run for run in runs if run.method == method] for method in methods}
    confidence = comparison.confidence
    machines = by_machine(runs)
    found = comparable(measures(by_method, base), same_machine=len(machines) == 1)
    rows = table(found, methods, confidence)
    first = by_method[methods[0]]
    own = {method: settings_of(method, settings) for method in methods}
    for method in methods if trials else ():
        own[method] = at_rate(own[method], chosen_rate(trials, method))
    tried = trial_rows(trials, methods)
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
        "wins": [
            row
            | {name: row[name].__dict__ for name in ("win", "tie", "loss", "net")}
            | {"reading": reading(row["net"], "higher")}
            for row in wins(by_method, confidence)
        ],
        "fault": fault_summary(faults, by_method),
        "samples": [
            {
                "prompt": answers["base"][index]["prompt"],
                "expected": answers["base"][index]["expected"],
                "answers": {name: lines[index]["answer"] for name, lines in answers.items()},
            }
            for index in range(min(SAMPLES, len(answers["base"])))
        ],
        "trials": tried,
        "edge": edge_sentence(tried),
        "notes": batch_notes(runs, own) + choice_notes(own),
        "machines": machines,
        "settings_that_differ": settings_that_differ(own),
        "settings": own[methods[0]].model_dump(mode="json"),
        "comparison": comparison.model_dump(mode="json", exclude={"cluster"}),  # it changes no figure
        "card": json.loads((dataset.path / "card.json").read_text(encoding="utf-8")),
        "runs": [run.history.facts | {"method": run.method, "seed": run.seed} for run in runs],
        "provenance": origins(runs, [("model", model), ("dataset", dataset)], base),
    }
    measured = all(run.history.facts["validation"] for run in runs)
    every = settings.training.eval_tokens
    view = {
        **data,
        "flat_settings": list(flat_settings(own[methods[0]])),
        "compared": [(name, value) for name, value in flat_settings(comparison) if name in data["comparison"]],
        "curves": {
            over: [pictures.loss_curves(by_method, over, every)]
            + ([pictures.validation_curves(by_method, over, every)] if measured else [])
            for over in ("tokens", "seconds")
        },
        "maps": pictures.module_maps(by_method),
        "fault_curve": pictures.fault_curves(faults[0], first[0]) if faults else None,
        "groups": [(group, [row for row in rows if row["group"] == group]) for group in GROUPS.values()],
        "study_setup": SETUP,
        "shared": shared_confidence(confidence, len(methods) - 1),
        "takes_turns": comparison.cluster is None,
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
                name = f"{trial.method.replace(':', '-')}/rate-{trial.learning_rate}"
                shutil.copytree(trial.history.path / "tensorboard", draft.path / "tensorboard" / name)
        draft.facts = {"verdict": data["verdict"]["text"]}
    return draft.done()
