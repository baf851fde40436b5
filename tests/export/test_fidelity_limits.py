"""When a figure of a GGUF passes, is warned of, or fails."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tasks.export.fidelity_limits import FidelityFigures, fidelity_checks, limits
from tasks.export.fidelity_measures import compare_row, fidelity_figures
from tasks.export.gguf_types import GGUF_TYPES
from tasks.settings.export import FidelitySettings


def figures_of_equals() -> FidelityFigures:
    """Of two rows that both models read alike."""
    logits = np.random.default_rng(0).normal(size=(5, 7))
    row = compare_row(merged=logits, gguf=logits, targets=np.arange(5), nll_base=np.ones(5))
    return fidelity_figures([row, row], [], file_type="7", end_token=True)


def test_limits_are_settings_and_a_warning_is_no_failure() -> None:
    own = limits(FidelitySettings(max_kl=0.5), "q8_0")
    assert own == replace(GGUF_TYPES["q8_0"].limits, max_kl=0.5)
    figures = figures_of_equals()
    assert figures.kl == 0
    assert figures.difference_kept == pytest.approx(1)
    checks = fidelity_checks(replace(figures, perplexity_ratio=1.005), own, "q8_0")
    readings = {check.key: check.reading for check in checks}
    assert readings.pop("perplexity_ratio") == "warned"
    assert set(readings.values()) == {"passed"}


@pytest.mark.parametrize(
    ("tokens", "top1", "ratio", "stderr", "failed"),
    [
        (35, 0.9143, 0.988, 0.020, set()),  # three of 35 tokens: that happens at 97 % too
        (3500, 0.9143, 0.988, 0.002, {"top1"}),
        (35, 0.80, 1.0, 0.020, {"top1"}),
        (35, 1.0, 1.03, 0.020, set()),
        (3500, 1.0, 1.03, 0.002, {"perplexity_ratio"}),
        (35, 1.0, 1.03, None, {"perplexity_ratio"}),
    ],
)
def test_few_tokens_fail_only_by_more_than_chance(
    tokens: int, top1: float, ratio: float, stderr: float | None, failed: set[str]
) -> None:
    figures = replace(
        figures_of_equals(), tokens=tokens, top1=top1, perplexity_ratio=ratio, perplexity_ratio_stderr=stderr
    )
    checks = fidelity_checks(figures, GGUF_TYPES["q8_0"].limits, "q8_0")
    assert {check.key for check in checks if check.reading == "failed"} == failed
