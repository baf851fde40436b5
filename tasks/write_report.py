"""Stage: one HTML file that says whether the tuned model is better, with its data as JSON and a short Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tasks.engine.artifacts import Artifact, Store
from tasks.engine.stage import stage
from tasks.ollama.names import model_name
from tasks.ollama.next_commands import next_commands, without_commands
from tasks.report.rendering import flat_settings, jinja, provenance, template_files
from tasks.report.sections import (
    LOST,
    merge_line,
    merging_cost,
    method_name,
    samples_side_by_side,
    training_table,
    verdict,
)
from tasks.settings.finetune import FinetuneSettings
from tasks.stats.score_differences import score_differences


@stage(libraries=("matplotlib", "jinja2", "scipy"), templates=template_files("report"))
def write_report(
    settings: FinetuneSettings,
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
    *,
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
    steps = [json.loads(line) for line in (history.path / "history.jsonl").read_text(encoding="utf-8").splitlines()]
    scores = {"base": _json(base.path / "scores.json"), "tuned": _json(tuned.path / "scores.json")}
    comparison = score_differences(base, tuned)
    artifacts = (model, dataset, history, base, tuned, merged, gguf, fidelity, registration, promotion)
    data: dict[str, Any] = {
        "title": f"{model_name(settings)}: is it better than {settings.model.name}?",
        "method": method_name(settings),
        "verdict": verdict(comparison),
        "comparison": comparison,
        "history": history.facts,
        "steps": steps,
        "card": _json(dataset.path / "card.json"),
        "samples": samples_side_by_side(scores["base"]["samples"], scores["tuned"]["samples"]),
        "merge": merged.facts["merge"],
        "merging_cost": merging_cost(history, scores["tuned"]["validation"]),
        "gguf": gguf.facts,
        "fidelity": fidelity.facts,
        "registration": registration.facts,
        "promotion": promotion.facts,
        "next": next_commands(registration, promotion),
        "settings": settings.model_dump(mode="json"),
        "provenance": provenance(history.facts["device"], [(artifact.kind, artifact) for artifact in artifacts]),
    }
    from tasks.report.figures import factors_curve, gradient_curve, length_histogram, loss_curve

    view = {
        **data,
        "without_commands": without_commands(gguf),
        "lost_by_merging": LOST,
        "settings": settings,
        "merge_line": merge_line(merged.facts["merge"]) if settings.model.quantization == "nf4" else "",
        "training": list(training_table(history.facts, steps)),
        "flat_settings": list(flat_settings(settings)),
        "reasons": sorted({reason for left in data["card"]["left_out"].values() for reason in left}),
        "turn_reasons": sorted({reason for left in data["card"]["turns_left_out"].values() for reason in left}),
        "figures": {
            "loss": loss_curve(steps, history.facts["validation"]),
            "gradient": gradient_curve(steps),
            "factors": factors_curve(steps) if "grit" in steps[-1] else "",
            "lengths": length_histogram(data["card"]["histogram"]),
        },
    }
    with store.draft("report") as draft:
        for name in ("report.html", "report.md"):
            (draft.path / name).write_text(jinja().get_template(f"{name}.j2").render(view), encoding="utf-8")
        text = json.dumps(data, indent=2, ensure_ascii=False)
        (draft.path / "report.json").write_text(text + "\n", encoding="utf-8")
        draft.facts = {"verdict": data["verdict"]["text"]}
    return draft.done()


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
