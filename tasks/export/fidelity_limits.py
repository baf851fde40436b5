"""What an export must keep to count as faithful: measures, limits by the GGUF's type, and the reading of each check."""

from __future__ import annotations

import math
from typing import NamedTuple

from tasks.export.checks import Check
from tasks.export.gguf_types import FILE_TYPES
from tasks.settings.export import FidelitySettings, GgufType


class Limits(NamedTuple):
    """From where on a check warns or fails."""

    warn_perplexity_ratio: float
    max_perplexity_ratio: float
    max_kl: float
    min_top1: float
    min_difference_kept: float = 0.9


DEFAULTS: dict[GgufType, Limits] = {
    "f16": Limits(1.002, 1.01, 0.01, 0.97),
    "bf16": Limits(1.002, 1.01, 0.01, 0.97),
    "q8_0": Limits(1.002, 1.01, 0.01, 0.97),
    "q6_k": Limits(1.01, 1.03, 0.05, 0.92),
    "q5_k_m": Limits(1.02, 1.06, 0.1, 0.9),
    "q4_k_m": Limits(1.05, 1.15, 0.25, 0.85),
}
"""Published for Q8_0 of Llama 3 8B is a perplexity ratio of 1.0004. Small models lose more by fewer bits."""


class Measured(NamedTuple):
    """What was found."""

    rows: int
    tokens: int
    perplexity_ratio: float
    perplexity_ratio_stderr: float | None
    kl: float
    top1: float
    difference_kept: float | None
    """None where tuning changed nothing."""
    difference_kept_stderr: float | None
    wrong_texts: tuple[str, ...]
    file_type: str
    end_token: bool = True


def limits(settings: FidelitySettings, gguf_type: GgufType) -> Limits:
    """The limits for a type, with the user's own in place of those that are set.

    Args:
        settings: the user's.
        gguf_type: of the file.
    """
    default = DEFAULTS[gguf_type]
    own = {name: value for name in Limits._fields if (value := getattr(settings, name)) is not None}
    return default._replace(**own)


def judged(measured: Measured, bounds: Limits, gguf_type: GgufType) -> list[Check]:
    """Hold what was measured against the limits.

    Args:
        measured: of the GGUF.
        bounds: the limits.
        gguf_type: what type the file was to be.
    """
    ratio, kept = measured.perplexity_ratio, measured.difference_kept
    wrong = measured.wrong_texts
    checks = [
        _check(
            "quantization",
            f"file type {measured.file_type}",
            f"{FILE_TYPES[gguf_type]} ({gguf_type})",
            measured.file_type == str(FILE_TYPES[gguf_type]),
        ),
        _check(
            "end of turn", "as trained" if measured.end_token else "another token", "as trained", measured.end_token
        ),
        _check(
            "token ids",
            f"{len(wrong)} texts differ, first {wrong[0]!r}" if wrong else "all texts equal",
            "all equal",
            not wrong,
        ),
        _check("mean KL divergence", f"{measured.kl:.5f} nats", f"≤ {bounds.max_kl:g}", measured.kl <= bounds.max_kl),
        _check(
            "likeliest token kept",
            f"{measured.top1:.2%}",
            f"≥ {bounds.min_top1:.0%} within two standard errors",
            measured.top1 + 2 * _share_error(bounds.min_top1, measured.tokens) >= bounds.min_top1,
        ),
        _check(
            "perplexity ratio",
            f"{ratio:.5f}{_error(measured.perplexity_ratio_stderr, 5)}",
            f"≤ {bounds.max_perplexity_ratio:g} within two standard errors, warned above "
            f"{bounds.warn_perplexity_ratio:g}",
            ratio - 2 * (measured.perplexity_ratio_stderr or 0.0) <= bounds.max_perplexity_ratio,
            warned=ratio > bounds.warn_perplexity_ratio,
        ),
    ]
    if kept is not None:
        error = measured.difference_kept_stderr
        checks.append(
            _check(
                "difference to the base kept",
                f"{kept:.3f}{_error(error, 3)}",
                f"≥ {bounds.min_difference_kept:g} within two standard errors",
                kept + 2 * (error or 0.0) >= bounds.min_difference_kept,
            )
        )
    return checks


def _check(name: str, value: str, limit: str, passed: bool, warned: bool = False) -> Check:
    return Check(name, value, limit, "failed" if not passed else "warned" if warned else "passed")


def _share_error(share: float, tokens: int) -> float:
    """Standard error of a share that is at the limit: of few tokens some may differ by chance."""
    return math.sqrt(share * (1 - share) / tokens)


def _error(error: float | None, digits: int) -> str:
    return "" if error is None else f" ± {error:.{digits}f}"
