"""Stage: one HTML file that says whether the tuned model is better, with its data as JSON and a short Markdown."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, NamedTuple

from tasks.engine.artifacts import Artifact, Store
from tasks.engine.stage import stage
from tasks.ollama.names import model_name
from tasks.ollama.next_commands import needed, next_commands
from tasks.report.rendering import flat_settings, jinja, provenance, template_files
from tasks.report.sections import (
    LOST,
    READINGS,
    merge_line,
    merging_cost,
    method_name,
    samples_side_by_side,
    training_table,
    verdict,
)
from tasks.settings.finetune import FinetuneSettings
from tasks.stats.json_files import read_json
from tasks.stats.score_differences import ScoreDifference, score_differences
from tasks.training.history import steps_of


class Outputs(NamedTuple):
    """What the stages before have left, in the order of the report's list of digests."""

    model: Artifact
    dataset: Artifact
    history: Artifact
    base: Artifact
    tuned: Artifact
    merged: Artifact
    gguf: Artifact
    fidelity: Artifact
    registration: Artifact
    promotion: Artifact


@stage(libraries=("matplotlib", "jinja2", "scipy"), templates=template_files("report"))
def write_report(
    settings: FinetuneSettings,
    *,
    model: Artifact,
    dataset: Artifact,
    history: Artifact,
    base: Artifact,
    tuned: Artifact,
    merged: Artifact,
    gguf: Artifact,
    fidelity: Artifact,
    registration: Artifact,
    promotion: Artifact,
    store: Store,
) -> Artifact:
    """Compare the tuned model with the base model and write it down.

    Args:
        settings: all settings, printed.
        model: the base model.
        dataset: the data card.
        history: the steps of the training.
        base: scores of the base model.
        tuned: scores of the merged model.
        merged: what the adapter was merged into, and why.
        gguf: the exported file and its answer.
        fidelity: how the file compares with the merged model.
        registration: where the model is known by which name.
        promotion: whether it is in use, and why.
        store: where the artifact goes.

    Returns:
        The artifact `report`: `report.html`, `report.json`, `report.md`.
    """
    outputs = Outputs(
        model=model, dataset=dataset, history=history, base=base, tuned=tuned, merged=merged, gguf=gguf,
        fidelity=fidelity, registration=registration, promotion=promotion,
    )  # fmt: skip
    data = report_data(settings, outputs)
    view = data | _words(settings, outputs, data) | {"figures": _figures(data)}
    with store.draft("report") as draft:
        for name in ("report.html", "report.md"):
            (draft.path / name).write_text(jinja().get_template(f"{name}.j2").render(view), encoding="utf-8")
        text = json.dumps(data, indent=2, ensure_ascii=False)
        (draft.path / "report.json").write_text(text + "\n", encoding="utf-8")
        draft.facts = {"verdict": data["verdict"]["text"]}
    return draft.done()


def report_data(settings: FinetuneSettings, outputs: Outputs) -> dict[str, Any]:
    """All that `report.json` holds.

    Args:
        outputs: of the stages before.
    """
    history, tuned = outputs.history, outputs.tuned
    base_scores, tuned_scores = (read_json(scores.path / "scores.json") for scores in (outputs.base, tuned))
    differences = score_differences(outputs.base, tuned)
    return {
        "title": f"{model_name(settings)}: is it better than {settings.model.name}?",
        "method": method_name(settings),
        "verdict": verdict(differences),
        "comparison": [_row(difference) for difference in differences],
        "history": history.facts,
        "steps": steps_of(history),
        "card": read_json(outputs.dataset.path / "card.json"),
        "samples": samples_side_by_side(base_scores["samples"], tuned_scores["samples"]),
        "merge": outputs.merged.facts["merge"],
        "merging_cost": merging_cost(history, tuned_scores["validation"]),
        "gguf": outputs.gguf.facts,
        "fidelity": outputs.fidelity.facts,
        "registration": outputs.registration.facts,
        "promotion": outputs.promotion.facts,
        "next": next_commands(outputs.registration, outputs.promotion),
        "settings": settings.model_dump(mode="json"),
        "provenance": provenance(history.facts["device"], [(artifact.kind, artifact) for artifact in outputs]),
    }


def _row(difference: ScoreDifference) -> dict[str, Any]:
    """A row of the table before and after; `key` is for programs, `name` for people."""
    return {"key": difference.key, "name": difference.label} | dataclasses.asdict(difference)


def _words(settings: FinetuneSettings, outputs: Outputs, data: dict[str, Any]) -> dict[str, Any]:
    """What the templates show beside the data, or in other words than it."""
    card = data["card"]
    return {
        "settings": settings,
        "needed": needed(outputs.registration),
        "lost_by_merging": LOST,
        "readings": READINGS,
        "merge_line": merge_line(outputs.merged.facts["merge"]) if settings.model.quantization == "nf4" else "",
        "training": list(training_table(data["history"], data["steps"])),
        "flat_settings": list(flat_settings(settings)),
        "reasons": sorted({reason for left_out in card["left_out"].values() for reason in left_out}),
        "turn_reasons": sorted({reason for left_out in card["turns_left_out"].values() for reason in left_out}),
    }


def _figures(data: dict[str, Any]) -> dict[str, str]:
    """The pictures, as SVG; empty where there is nothing to draw."""
    from tasks.report.figures import factors_curve, gradient_curve, length_histogram, loss_curve

    steps = data["steps"]
    return {
        "loss": loss_curve(steps, data["history"]["validation"]),
        "gradient": gradient_curve(steps),
        "factors": factors_curve(steps) if "grit" in steps[-1] else "",
        "lengths": length_histogram(data["card"]["histogram"]),
    }
