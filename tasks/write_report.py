"""Stage: one HTML file that says whether the tuned model is better, with its data as JSON and a short Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from tasks.artifacts import Artifact, Store
from tasks.history import kept_loss
from tasks.registration import next_commands, without_commands
from tasks.rendering import figure, flat_settings, jinja, plusminus, provenance, signed
from tasks.score_differences import score_differences
from tasks.settings import FinetuneSettings
from tasks.stage import stage

_OPENINGS = {
    (True, False): "The tuned model is better than the base model on held-out data.",
    (False, True): "The tuned model is worse than the base model on held-out data.",
    (True, True): "The tuned model is better in some held-out measures and worse in others.",
    (False, False): "No difference between tuned and base model exceeds its error.",
}
"""By whether something is better, and whether something is worse."""
SMALL = 20
"""Of fewer held-out rows or documents a difference is no reason to praise or to blame."""
LOST = 0.05
"""Share of the gain that merging may take without a warning."""


@stage(libraries=("matplotlib", "jinja2", "scipy"), templates=("report.html.j2", "report.md.j2", "style.css.j2"))
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
        "title": f"{settings.ollama_name}: is it better than {settings.model.name}?",
        "method": method_name(settings),
        "verdict": verdict(comparison),
        "comparison": comparison,
        "history": history.facts,
        "steps": steps,
        "card": _json(dataset.path / "card.json"),
        "samples": _samples(scores["base"]["samples"], scores["tuned"]["samples"]),
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
    from tasks.figures import factors_curve, gradient_curve, length_histogram, loss_curve

    view = {
        **data,
        "without_commands": without_commands(gguf),
        "lost_by_merging": LOST,
        "settings": settings,
        "merge_line": merge_line(merged.facts["merge"]) if settings.model.quantization == "nf4" else "",
        "training": list(_training_table(history.facts, steps)),
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


def verdict(comparison: list[dict[str, Any]]) -> dict[str, str]:
    """Some sentences with numbers; better only if something is better and nothing is worse, of rows enough.

    Args:
        comparison: the rows of the table.
    """
    readings = [row["reading"] for row in comparison]
    number = max((row["number"] for row in comparison if row["reading"] in ("better", "worse")), default=SMALL)
    better, worse = "better" in readings, "worse" in readings
    if not comparison:
        return {"tone": "", "text": "Nothing was measured on held-out data, so nothing can be said."}
    tone = "worse" if worse else "better" if better else ""
    if not set(readings) & {"better", "worse", "within error"}:
        opening = "Too little was held out to say whether the tuned model is better."
    else:
        opening = _OPENINGS[better, worse]
    if number < SMALL:
        tone, opening = "", f"{opening} But {number} rows or documents are few, and others may differ: hold out more."
    parts = [
        f"{row['name']} {figure(row['base'])} → {figure(row['tuned'])} "
        f"({signed(row['difference'])}{plusminus(row['stderr'])}, {row['reading']})"
        for row in comparison
    ]
    return {"tone": tone, "text": f"{opening} {'; '.join(parts)}."}


def method_name(settings: FinetuneSettings) -> str:
    """The method with what tells it from others, for the head of the report."""
    if settings.method == "baseline":
        return "baseline (AdamW)"
    return f"GRIT (variant {settings.grit.variant}, basis {settings.grit.first_basis})"


def merging_cost(history: Artifact, validation: dict[str, Any] | None) -> dict[str, Any] | None:
    """What merging, and rounding to the base's dtype, took of the validation loss that training gained.

    Args:
        history: of the training.
        validation: from the scores of the merged model, on the same rows.

    Returns:
        `trained` and `merged`, in nats per supervised token, and `lost`, the share of the gain; none where nothing was
        held out or gained.
    """
    if not validation or not history.facts["validation"]:
        return None
    before, trained, merged = history.facts["validation"][0][1], kept_loss(history), validation["loss"]
    if trained >= before:
        return None
    return {"trained": trained, "merged": merged, "lost": (merged - trained) / (before - trained)}


def merge_line(merge: dict[str, Any]) -> str:
    """What an adapter that was trained on NF4 was merged into, and what else was tried.

    Args:
        merge: from the facts of the artifact `merged`.
    """
    weights = {"original": "the original 16-bit weights", "dequantized": "the dequantised weights that training saw"}
    into, losses = merge["into"], merge.get("validation_loss")
    if losses is None:
        return f"Trained on NF4 and merged into {weights[into]}; the other merge was not tried."
    (other,) = losses.keys() - {into}
    difference = merge["difference"] if into == "original" else -merge["difference"]
    return (
        f"Trained on NF4. Merged into {weights[into]} its validation loss is {figure(losses[into])}, merged into "
        f"{weights[other]} {figure(losses[other])} (difference {signed(difference)}{plusminus(merge['stderr'])}); "
        "the first ships."
    )


def _samples(base: list[dict[str, str]], tuned: list[dict[str, str]]) -> list[dict[str, Any]]:
    return [
        {
            "prompt": before["prompt"],
            "expected": before["expected"],
            "base": before["answer"],
            "tuned": after["answer"],
            "base_exact": before["answer"].strip() == before["expected"].strip(),
            "tuned_exact": after["answer"].strip() == before["expected"].strip(),
        }
        for before, after in zip(base, tuned, strict=True)
    ]


def _training_table(history: dict[str, Any], steps: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    yield f"final training loss (per token, last steps: {history['final_loss_steps']})", figure(history["final_loss"])
    if history["kept"]:
        step, loss = history["kept"]
        yield (
            "adapter that was kept",
            f"of step {step}, with the lowest validation loss ({figure(loss)}) on the rows that the verdict measures",
        )
    if history["stopped_early"]:
        yield "stopped early", f"after step {history['steps']}: the validation loss fell no more"
    yield "median time of a step", f"{history['median_seconds_per_step']:.2f} s"
    yield "time of all steps", f"{history['total_seconds'] / 60:.1f} min"
    if history["basis_seconds"]:
        yield "time of finding the first basis", f"{history['basis_seconds'] / 60:.1f} min"
    yield "tokens", f"{history['tokens']:,} ({history['supervised_tokens']:,} supervised)"
    yield "tokens per second", f"{history['tokens'] / history['total_seconds']:.0f}"
    yield "trainable parameters", f"{history['trainable_parameters']:,}"
    yield f"peak memory ({history['peak_memory_kind']})", f"{history['peak_memory_bytes'] / 1e9:.2f} GB"
    if "grit" in steps[-1]:
        grit = [step["grit"] for step in steps]
        last = grit[-1]
        yield "modules with GRIT factors in use, last step", f"{last['in_use']:.0%}"
        yield "norm of the preconditioned gradient / raw, median step", f"{median(g['norm_ratio'] for g in grit):.3g}"
        yield "mean rank, last step", f"{last['rank']:.1f}"
        yield "largest condition number, last step", f"{last['condition_a']:.0f} (A), {last['condition_b']:.0f} (B)"


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
