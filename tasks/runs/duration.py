"""How long a run will take, roughly: floating-point operations over the speed that this machine shows."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tasks.engine.planning import Plan
from tasks.export.merge_candidates import nf4_merge
from tasks.runs.waiting import waiting_stages
from tasks.settings.finetune import FinetuneSettings, TrainingSettings
from tasks.training.token_counts import supervised_tokens, tokens_per_step

ON_TOP = {
    "merge": "merging",
    "convert": "conversion",
    "check_fidelity": "the GGUF's check",
    "answer_prompts": "answers",
    "measure_forgetting": "forgetting",
    "measure_second_data": "the second data set",
    "judge_answers": "the judge",
}
"""Stages whose time nothing is said of, and what they are called."""
ESTIMATED = {"train", "reproduce_fault", "score"}
"""Stages whose time is said."""
USED_SHARE = 0.5
"""Of the speed of a large matrix product, what a training and a validation are taken to reach."""
FORWARD = 2
"""Floating-point operations per weight and token."""
BACKWARD = 2
"""The same, of the way back through the activations: a frozen weight has no gradient of its own."""


@dataclass(frozen=True)
class Rows:
    """The rows that are trained on and validated with."""

    card: Mapping[str, Any]
    """The data set's facts."""
    validation: int | None
    """How many; none as long as the rows have not been read, and `card` supposes each to be as long as can be."""

    @property
    def length(self) -> float:
        """Tokens of a training row, on average."""
        return float(self.card["tokens"]["train"] / self.card["rows"]["train"])


def duration_line(settings: FinetuneSettings, parameters: int, plan: Plan) -> str:
    """Say how long trainings and validations will take, and what comes on top.

    Args:
        parameters: the base model's.
        plan: the state of its stages.
    """
    waiting, rows = waiting_stages(plan), _rows(settings, plan)
    rate = USED_SHARE * matmul_rate(settings.model.dtype)
    parts = []
    if tokens := _trained_tokens(settings, waiting, rows):
        operations = _operations_per_trained_token(settings.training) * parameters * tokens
        bound, counted = "about", ""
        if rows.validation is None:
            bound, counted = "at most", f" (each row as {rows.length:.0f} tokens, until they are read)"
        parts.append(f"training {bound} {_minutes(operations / rate)}{counted}")
    if rows.validation is not None:
        tokens = _validations(settings, waiting, rows) * rows.validation * rows.length
        parts.append(f"validation about {_minutes(FORWARD * parameters * tokens / rate)}")
    others = _on_top(settings, waiting, rows)
    on_top = f" On top: {', '.join(others)}." if others else ""
    return f"Time: {', '.join(parts) or 'not known'}, at half of this machine's measured matmul speed.{on_top}"


def matmul_rate(dtype: str) -> float:
    """Floating-point operations per second of a large matrix product, measured for a moment.

    Args:
        dtype: torch's name of the numbers' type.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 1024
    left = torch.ones(size, size, dtype=getattr(torch, dtype), device=device)
    float((left @ left)[0, 0])
    started = time.perf_counter()
    for _ in range(4):
        right = left @ left
    float(right[0, 0])
    return 4 * 2 * size**3 / (time.perf_counter() - started)


def _rows(settings: FinetuneSettings, plan: Plan) -> Rows:
    dataset = plan.result_of("prepare_dataset")
    if dataset is not None:
        return Rows(dataset.facts, dataset.facts["rows"]["validation"])
    longest = settings.data.max_length
    return Rows({"max_length": longest, "tokens": {"train": longest}, "rows": {"train": 1}}, None)


def _operations_per_trained_token(training: TrainingSettings) -> int:
    """Of each weight; activations that are not kept are computed a second time on the way back."""
    return FORWARD + BACKWARD + (FORWARD if training.gradient_checkpointing else 0)


def _trained_tokens(settings: FinetuneSettings, waiting: list[str], rows: Rows) -> float:
    """What all trainings read; the study's fault pads each row to the longest that may be."""
    training = settings.training
    padded = training.per_device_batch_size * training.gradient_accumulation_steps * settings.data.max_length
    in_step = tokens_per_step(training, rows.card)
    return training.max_steps * (waiting.count("train") * in_step + waiting.count("reproduce_fault") * padded)


def _validations(settings: FinetuneSettings, waiting: list[str], rows: Rows) -> int:
    """How often the validation rows are read: in scoring, to choose between two merges, and in each training."""
    training, trainings = settings.training, waiting.count("train") + waiting.count("reproduce_fault")
    intervals = training.max_steps / training.eval_steps if training.eval_steps else 1.0
    if training.eval_tokens:
        intervals = min(training.max_steps, supervised_tokens(training, rows.card) / training.eval_tokens)
    nf4 = nf4_merge(settings)
    merges = waiting.count("merge") if nf4 and nf4.into == "best" else 0
    return waiting.count("score") + 2 * merges + trainings * (1 + math.ceil(intervals))


def _on_top(settings: FinetuneSettings, waiting: list[str], rows: Rows) -> list[str]:
    """What takes time that nothing is said of."""
    others = [words for name, words in ON_TOP.items() if name in waiting]
    others += ["GRIT's first basis"] if "train" in waiting and settings.method == "grit" else []
    others += ["lm-eval's answers"] if "score" in waiting and settings.scoring.tasks else []
    others += ["validation"] if rows.validation is None else []
    return others


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
