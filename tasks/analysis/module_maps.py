"""The pictures of a comparison that show what GRIT does in each module."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from tasks.analysis.metric import Runs
from tasks.engine.artifacts import Artifact
from tasks.report.figures import svg
from tasks.stats.json_files import read_json_lines


@dataclass(frozen=True)
class ModuleFigure:
    """What is shown of each module with GRIT."""

    name: str
    """In the history."""
    scale: str
    """Figures of one scale share their colours."""
    label: str
    meaning: str


MODULE_FIGURES = (
    ModuleFigure("cosine", "cosine", "cosine", "cosine between raw and preconditioned gradient"),
    ModuleFigure("effective_rank_h", "rank", "effective rank", "effective rank of the factor of A x"),
    ModuleFigure(
        "effective_rank_u",
        "rank",
        "effective rank",
        "effective rank of the factor of the gradient with respect to A x",
    ),
)


def module_maps(runs: Runs) -> list[tuple[str, str, str]]:
    """For each method with GRIT: by layer and projection the cosine and the factors' effective rank.

    Values are those of the last step, averaged over seeds. Pictures of the same kind share their colours.

    Args:
        runs: by method.

    Returns:
        Method, what is shown, and the picture; the same figure of all methods stands together.
    """
    means = _module_means(runs)
    values: dict[str, list[float]] = {}
    for _, figure, by_module in means:
        values.setdefault(figure.scale, []).extend(by_module.values())
    scales = {scale: (min(of_scale), max(of_scale)) for scale, of_scale in values.items()}
    return [
        (method, figure.meaning, _map(by_module, figure.label, scales[figure.scale]))
        for method, figure, by_module in means
    ]


def _module_means(runs: Runs) -> list[tuple[str, ModuleFigure, dict[str, float]]]:
    """The figures of each method's modules at the last step, averaged over seeds; methods without any are left out.

    Args:
        runs: by method.
    """
    last = {method: [_last_modules(run.history) for run in of_method] for method, of_method in runs.items()}
    means = []
    for figure in MODULE_FIGURES:
        for method, seeds in last.items():
            if not all(seeds):
                continue
            values = {module: [modules[module][figure.name] for modules in seeds] for module in seeds[0]}
            measured = [value for of_module in values.values() for value in of_module]
            if None not in measured and any(measured):  # a factor that nothing has come into yet has no rank
                by_module = {module: float(np.mean(of_module)) for module, of_module in values.items()}
                means.append((method, figure, by_module))
    return means


def _last_modules(history: Artifact) -> dict[str, dict[str, Any]]:
    path = history.path / "modules.jsonl"
    lines = read_json_lines(path) if path.is_file() else []
    return {line["module"]: line for line in lines if line["step"] == lines[-1]["step"]}


def _map(values: dict[str, float], label: str, scale: tuple[float, float]) -> str:
    """By layer and projection; what has no number in its path stands in a column of its own."""
    places = {module: _place(module) for module in values}
    rows = sorted({row for _, row in places.values()})
    columns = sorted({column for column, _ in places.values()})
    grid = np.full((len(rows), len(columns)), np.nan)
    for module, (column, row) in places.items():
        grid[rows.index(row), columns.index(column)] = values[module]

    def draw(axes: Axes) -> None:
        low, high = scale
        # A picture of one pixel for each module stays small however many there are.
        image = axes.imshow(
            np.ma.masked_invalid(grid), cmap="viridis", vmin=low, vmax=high, aspect="auto", origin="lower",
            interpolation="none", extent=(0, len(columns), 0, len(rows)),
        )  # fmt: skip
        axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
        shown = range(0, len(columns), max(1, len(columns) // 10))
        axes.set_xticks([index + 0.5 for index in shown], [str(columns[index]) for index in shown])
        axes.set(xlabel="layer")
        axes.grid(visible=False)
        axes.figure.colorbar(image, ax=axes, label=label)

    return svg(draw, (6.4, 2.6))


def _place(module: str) -> tuple[int, str]:
    number = re.search(r"\.(\d+)\.", module)
    return int(number[1]) if number else -1, module.rpartition(".")[2]
