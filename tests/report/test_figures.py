"""The report's pictures show what they were given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tasks.report.figures import factors_curve, gradient_curve, log_scale


def test_a_variant_without_a_cosine_is_drawn_without_one() -> None:
    """As `eigen_adam`; the label of the axis is drawn as paths, so the picture is smaller by it."""
    steps = [{"step": step, "grad_norm": 1.0, "grit": {"norm_ratio": 1.0}} for step in (1, 2)]
    turned = [{**step, "grit": {"norm_ratio": 1.0, "cosine": 0.7}} for step in steps]
    assert len(gradient_curve(steps)) < len(gradient_curve(turned))


def test_the_pictures_of_grit_show_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: dict[str, list[float]] = {}

    def draw(picture: Callable[[Axes], None]) -> str:
        drawn = Figure()
        picture(drawn.subplots())
        shown.update({str(line.get_label()): list(line.get_ydata()) for axes in drawn.axes for line in axes.lines})
        return ""

    monkeypatch.setattr("tasks.report.figures.svg", draw)
    grit: dict[str, Any] = {"norm_ratio": 0.5, "cosine": 0.7, "condition_a": 10.0, "condition_b": 100.0, "in_use": 0.25}
    steps = [{"step": step, "grad_norm": 2.0 * step, "grit": grit} for step in (1, 2)]
    gradient_curve(steps)
    assert shown == {"gradient norm": [2, 4], "preconditioned": [1, 2], "cosine": [0.7, 0.7]}
    shown.clear()
    gradient_curve([step | {"grit": grit | {"norm_ratio": 1.0}} for step in steps])
    assert shown == {"gradient norm, also preconditioned": [2, 4], "cosine": [0.7, 0.7]}
    shown.clear()
    factors_curve(steps)
    wanted = {"condition number, A": 10, "condition number, B": 100, "modules in use": 0.25}
    assert shown == {name: [value] * 2 for name, value in wanted.items()}


@pytest.mark.parametrize("limits", [(1.41, 1.48), (0.8, 1.3), (9, 11), (0.5, 6), (0.01, 8), (1, 1e6), (1e-4, 1e5)])
def test_a_logarithmic_axis_has_some_numbers(limits: tuple[float, float]) -> None:
    axes = Figure(figsize=(6.4, 3.4)).subplots()
    axes.plot([0, 1], limits)
    log_scale(axes)
    low, high = axes.get_ylim()
    assert 3 <= sum(low <= tick <= high for tick in axes.get_yticks()) <= 12
