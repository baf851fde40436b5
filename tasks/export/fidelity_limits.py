"""What an export must keep to count as faithful: figures, limits, and the reading of each check."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

from tasks.export.checks import Check
from tasks.export.gguf_types import GGUF_TYPES, FidelityLimits
from tasks.settings.export import FidelitySettings, GgufType


@dataclass(frozen=True)
class FidelityFigures:
    """What was measured of a GGUF, over all rows."""

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
    end_token: bool
    """Whether the GGUF ends a generation at the token that ends a turn."""


def limits(settings: FidelitySettings, gguf_type: GgufType) -> FidelityLimits:
    """The limits for a type, with the user's own in place of those that are set.

    Args:
        settings: the user's.
        gguf_type: of the file.
    """
    default = GGUF_TYPES[gguf_type].limits
    own = {name: value for name in asdict(default) if (value := getattr(settings, name)) is not None}
    return replace(default, **own)


def fidelity_checks(figures: FidelityFigures, bounds: FidelityLimits, gguf_type: GgufType) -> list[Check]:
    """Hold what was measured against the limits.

    Args:
        figures: the GGUF's.
        gguf_type: what type the file was to be.
    """
    file_type = GGUF_TYPES[gguf_type].file_type
    ratio, kept = figures.perplexity_ratio, figures.difference_kept
    wrong = figures.wrong_texts
    checks = [
        _check(
            "quantization",
            "quantization",
            f"file type {figures.file_type}",
            f"{file_type} ({gguf_type})",
            figures.file_type == str(file_type),
        ),
        _check(
            "end_of_turn",
            "end of turn",
            "as trained" if figures.end_token else "another token",
            "as trained",
            figures.end_token,
        ),
        _check(
            "token_ids",
            "token ids",
            f"{len(wrong)} texts differ, first {wrong[0]!r}" if wrong else "all texts equal",
            "all equal",
            not wrong,
        ),
        _check(
            "kl", "mean KL divergence", f"{figures.kl:.5f} nats", f"≤ {bounds.max_kl:g}", figures.kl <= bounds.max_kl
        ),
        _check(
            "top1",
            "likeliest token kept",
            f"{figures.top1:.2%}",
            f"≥ {bounds.min_top1:.0%} within two standard errors",
            figures.top1 + 2 * _share_error(bounds.min_top1, figures.tokens) >= bounds.min_top1,
        ),
        _check(
            "perplexity_ratio",
            "perplexity ratio",
            f"{ratio:.5f}{_error(figures.perplexity_ratio_stderr, 5)}",
            f"≤ {bounds.max_perplexity_ratio:g} within two standard errors, warned above "
            f"{bounds.warn_perplexity_ratio:g}",
            ratio - 2 * (figures.perplexity_ratio_stderr or 0.0) <= bounds.max_perplexity_ratio,
            warned=ratio > bounds.warn_perplexity_ratio,
        ),
    ]
    if kept is not None:
        error = figures.difference_kept_stderr
        checks.append(
            _check(
                "difference_kept",
                "difference to the base kept",
                f"{kept:.3f}{_error(error, 3)}",
                f"≥ {bounds.min_difference_kept:g} within two standard errors",
                kept + 2 * (error or 0.0) >= bounds.min_difference_kept,
            )
        )
    return checks


def _check(key: str, name: str, value: str, limit: str, passed: bool, *, warned: bool = False) -> Check:
    return Check(name, value, limit, "failed" if not passed else "warned" if warned else "passed", key=key)


def _share_error(share: float, tokens: int) -> float:
    """Standard error of a share that is at the limit: of few tokens some may differ by chance."""
    return math.sqrt(share * (1 - share) / tokens)


def _error(error: float | None, digits: int) -> str:
    return "" if error is None else f" ± {error:.{digits}f}"
