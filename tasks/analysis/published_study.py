"""The published figures of the study that this project starts from, and what each of them measured."""

from __future__ import annotations

from typing import NamedTuple

SETUP = (
    "Llama-3-8B in 4-bit NF4 on vicgalle/alpaca-gpt4, LoRA r=16, 200 steps of 8 rows, learning rate 2e-4, seed 3407; "
    "one run each, no validation set, no error given. Another model, other data and another machine than those above."
)


class Published(NamedTuple):
    """One row of the study's table."""

    name: str
    baseline: str
    grit: str
    measured: str
    ours: str | None
    """Name, or its beginning, of the measure of ours that comes nearest."""
    per: float = 1.0
    """Ours is divided by this for the study's unit."""
    unit: str = ""
    """The study's, where ours has another."""


PUBLISHED = (
    Published(
        "final training loss",
        "1.0439",
        "0.0899 (“11.6×”)",
        "the baseline's per supervised token; GRIT's averaged over padding to 2048 tokens",
        "final training loss",
    ),
    Published(
        "training time",
        "16.1 min",
        "91 min",
        "GRIT's rows were all 2048 tokens long",
        "seconds of all steps",
        per=60,
        unit="min",
    ),
    Published(
        "seconds a step",
        "4.8",
        "23 (its own log: 27.2)",
        "other kernels, another optimizer and other row lengths",
        "median seconds of a step",
    ),
    Published(
        "GPU memory",
        "6.6 GB",
        "7.4 GB (+12 %)",
        "what the GPU held; other kernels, optimizer and row lengths",
        "peak memory",
    ),
    Published("final gradient norm", "0.3046", "0.136", "of losses with different denominators", "gradient norm"),
    Published("first logged loss", "7.5 (stated)", "7.4957", "the same data elsewhere starts near 1.5", None),
    Published("“convergence”", "200 steps", "10 steps", "the padding was learned in 7 steps", None),
)
