"""The published figures of the study that this project starts from, and what each of them measured."""

from __future__ import annotations

from dataclasses import dataclass

SETUP = (
    "Llama-3-8B in 4-bit NF4 on vicgalle/alpaca-gpt4, LoRA r=16, 200 steps of 8 rows, learning rate 2e-4, seed 3407; "
    "one run each, no validation set, no error given. Another model, other data and another machine than those above."
)


@dataclass(frozen=True, kw_only=True)
class Published:
    """One row of the study's table."""

    key: str
    name: str
    baseline: str
    grit: str
    measured: str
    ours: str | None
    """Key of the row of ours that comes nearest."""
    per: float = 1.0
    """Ours is divided by this for the study's unit."""
    unit: str = ""
    """The study's, where ours has another."""


PUBLISHED = (
    Published(
        key="training_loss",
        name="final training loss",
        baseline="1.0439",
        grit="0.0899 (“11.6×”)",
        measured="the baseline's per supervised token; GRIT's averaged over padding to 2048 tokens",
        ours="training_loss",
    ),
    Published(
        key="training_time",
        name="training time",
        baseline="16.1 min",
        grit="91 min",
        measured="GRIT's rows were all 2048 tokens long",
        ours="total_seconds",
        per=60,
        unit="min",
    ),
    Published(
        key="seconds_per_step",
        name="seconds a step",
        baseline="4.8",
        grit="23 (its own log: 27.2)",
        measured="other kernels, another optimizer and other row lengths",
        ours="median_seconds_per_step",
    ),
    Published(
        key="gpu_memory",
        name="GPU memory",
        baseline="6.6 GB",
        grit="7.4 GB (+12 %)",
        measured="what the GPU held; other kernels, optimizer and row lengths",
        ours="peak_memory",
    ),
    Published(
        key="gradient_norm",
        name="final gradient norm",
        baseline="0.3046",
        grit="0.136",
        measured="of losses with different denominators",
        ours="gradient_norm",
    ),
    Published(
        key="first_loss",
        name="first logged loss",
        baseline="7.5 (stated)",
        grit="7.4957",
        measured="the same data elsewhere starts near 1.5",
        ours=None,
    ),
    Published(
        key="convergence",
        name="“convergence”",
        baseline="200 steps",
        grit="10 steps",
        measured="the padding was learned in 7 steps",
        ours=None,
    ),
)
