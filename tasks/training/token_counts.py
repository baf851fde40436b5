"""How many tokens the steps of a training read, reckoned from the data card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tasks.settings.finetune import TrainingSettings


def tokens_per_step(training: TrainingSettings, card: Mapping[str, Any]) -> float:
    """Real tokens of one optimizer step, on average; of packed rows what they hold when full.

    Args:
        training: the batch.
        card: the data set's, or its facts.
    """
    packed = training.batching == "packed"
    row = card["max_length"] if packed else card["tokens"]["train"] / card["rows"]["train"]
    return float(training.per_device_batch_size * training.gradient_accumulation_steps * row)


def supervised_tokens(training: TrainingSettings, card: Mapping[str, Any]) -> float:
    """Supervised tokens of all optimizer steps, on average.

    Args:
        training: batch and steps.
        card: the data set's, or its facts.
    """
    share = card["supervised_tokens"]["train"] / card["tokens"]["train"]
    return float(training.max_steps * tokens_per_step(training, card) * share)
