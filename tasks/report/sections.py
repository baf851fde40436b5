"""The sections of a run's report: verdict, cost of the merge, samples, table of the training."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

from grit.config import GRITConfig
from tasks.engine.artifacts import Artifact
from tasks.settings.finetune import ADAMW, FinetuneSettings
from tasks.stats.numbers import figure, plusminus, signed
from tasks.stats.score_differences import Reading, ScoreDifference
from tasks.training.history import kept_loss

_OPENINGS = {
    (True, False): "The tuned model is better than the base model on held-out data.",
    (False, True): "The tuned model is worse than the base model on held-out data.",
    (True, True): "The tuned model is better in some held-out measures and worse in others.",
    (False, False): "No difference between tuned and base model exceeds its error.",
}
"""By whether something is better, and whether something is worse."""
READINGS: dict[Reading, str] = {
    "better": "better",
    "worse": "worse",
    "different": "different",
    "within_error": "within error",
    "unknown_error": "error unknown",
    "not_a_number": "not a number",
}
"""The words for what a difference says."""
SMALL = 20
"""Of fewer held-out rows or documents a difference is no reason to praise or to blame."""
LOST = 0.05
"""Share of the gain that merging may take without a warning."""


def verdict(differences: list[ScoreDifference]) -> dict[str, str]:
    """Some sentences with numbers; better only if something is better and nothing is worse, of rows enough.

    Args:
        differences: the rows of the table.
    """
    readings = [row.reading for row in differences]
    number = max((row.number for row in differences if row.reading in ("better", "worse")), default=SMALL)
    better, worse = "better" in readings, "worse" in readings
    if not differences:
        return {"tone": "", "text": "Nothing was measured on held-out data, so nothing can be said."}
    tone = "worse" if worse else "better" if better else ""
    if not set(readings) & {"better", "worse", "within_error"}:
        opening = "Too little was held out to say whether the tuned model is better."
    else:
        opening = _OPENINGS[better, worse]
    if number < SMALL:
        tone, opening = "", f"{opening} But {number} rows or documents are few, and others may differ: hold out more."
    parts = [
        f"{row.label} {figure(row.base)} → {figure(row.tuned)} "
        f"({signed(row.difference)}{plusminus(row.stderr)}, {READINGS[row.reading]})"
        for row in differences
    ]
    return {"tone": tone, "text": f"{opening} {'; '.join(parts)}."}


def method_name(settings: FinetuneSettings) -> str:
    """The method with what tells it from others, for the head of the report."""
    if settings.method == "baseline":
        optimizer = settings.training.optimizer
        return f"baseline ({'AdamW' if optimizer in ADAMW else optimizer})"
    return f"GRIT (variant {settings.grit.variant}, basis {GRITConfig(**settings.grit.model_dump()).first_basis})"


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


def samples_side_by_side(base: list[dict[str, str]], tuned: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Both models' answers to the same prompts, and which of them are exact.

    Args:
        base: the base model's samples.
        tuned: the tuned model's.
    """
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


def training_table(history: dict[str, Any], steps: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """The table of the training: names and figures.

    Args:
        history: facts of the artifact `history`.
        steps: its lines.
    """
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
