"""The pictures of GRIT's modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tasks.analysis.module_maps import module_maps
from tests.support.made_up_comparison import MadeUp, by_method


def test_maps_of_a_scale_share_their_colours(outputs: MadeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    scales: list[Any] = []

    def draw(picture: Callable[[Axes], None], size: tuple[float, float]) -> str:
        figure = Figure(size)
        axes = figure.subplots()
        picture(axes)
        (image,) = axes.images
        scales.append((figure.axes[1].get_ylabel(), image.get_clim()))
        return ""

    monkeypatch.setattr("tasks.analysis.module_maps.svg", draw)
    module_maps(by_method(outputs.runs(("baseline", "grit"), 2)))
    rank = ("effective rank", (2.5, 6))
    assert scales == [("cosine", (0.5, pytest.approx(0.8))), rank, rank]
