"""The words of a comparison: what its keys are called where a person reads them."""

from __future__ import annotations

from typing import Literal

from tasks.analysis.metric import Metric
from tasks.stats.score_differences import VALIDATION_LOSS
from tasks.training.history import LAST

Reading = Literal["better", "worse", "different", "within_error", "one_seed", "unknown_error"]
"""What a difference to the reference says."""
READINGS: dict[Reading, str] = {
    "better": "better",
    "worse": "worse",
    "different": "different",
    "within_error": "within error",
    "one_seed": "one seed, which says nothing of others",
    "unknown_error": "equal for all seeds, error unknown",
}
GROUPS = {
    "loss": "Loss",
    "test": "Test",
    "answers": "Answers",
    "forgetting": "Forgetting",
    "second": "Second data set",
    "cost": "Cost",
}
"""The parts of the table, in their order."""
LABELS = {
    "training_loss": "final training loss, nats per supervised token",
    VALIDATION_LOSS: "validation loss, nats per supervised token ({rows} rows)",
    "perplexity": "perplexity of those rows (differences as ratios)",
    "generalization_gap": "generalisation gap: validation less training loss",
    "merging_cost": "loss added by merging and rounding",
    "lowest_loss_step": "step of the lowest validation loss",
    "lm_eval": "{task}: {metric} ({documents} documents)",
    "answers": "{meaning} ({rows} answers)",
    "forgetting": "loss on a text outside the data, nats per token ({rows} paragraphs)",
    "second_validation_loss": "loss on the second data set, nats per supervised token ({rows} rows)",
    "steps_to_reference": "steps to reach {reference}'s final validation loss",
    "seconds_to_reference": "seconds to reach {reference}'s final validation loss",
    "median_seconds_per_step": "median seconds of a step",
    "total_seconds": "seconds of all steps",
    "basis_seconds": "seconds of finding the first basis",
    "tokens_per_second": "tokens per second",
    "supervised_tokens_per_second": "supervised tokens per second",
    "peak_memory": "peak memory, GB ({kinds})",
    "gradient_norm": f"gradient norm before clipping, mean of the last steps ({LAST} at most)",
    "trainable_parameters": "trainable parameters",
    "effective_parameters": "effective parameters (weights of the saved adapter)",
    "gguf_size": "GGUF, MB",
    "gguf_tokens_per_second": "GGUF, tokens per second of one answer in llama.cpp",
    "energy:processor": "energy of the processor while training, kJ",
    "energy:gpu": "energy of the GPU while training, kJ",
}
"""By key, or by a family's name, which is what stands before the colon of its keys."""


def label(metric: Metric) -> str:
    """What a row of the table is called, with its unit and its number of rows."""
    words = LABELS.get(metric.key) or LABELS[metric.key.partition(":")[0]]
    rows = {} if metric.counts is None else {"rows": len(metric.counts)}
    return words.format(**rows, **metric.facts)


def sentence(words: str) -> str:
    """Words that begin a sentence.

    Args:
        words: not empty.
    """
    return f"{words[0].upper()}{words[1:]}"
