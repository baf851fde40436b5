"""Figures as text."""

from __future__ import annotations


def figure(value: float | None) -> str:
    """A figure to four digits after the point; a dash where there is none."""
    return "—" if value is None else f"{value:.4f}"


def signed(value: float | None) -> str:
    """A difference, always with its sign; a dash where there is none."""
    return "—" if value is None else f"{value:+.4f}"


def plusminus(error: float | None) -> str:
    """One standard error, or nothing where none is known."""
    return "" if error is None else f" ± {error:.4f}"
