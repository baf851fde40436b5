"""The pictures of a comparison: curves with bands, GRIT's modules, and a faulty loss beside the honest one."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes

from tasks.artifacts import Artifact
from tasks.compared_runs import ComparedRun, FaultRun
from tasks.comparison import Runs
from tasks.comparison_measures import steps_of
from tasks.figures import svg

COLOURS = (
    "#3b82c4",
    "#d9773a",
    "#4f9d69",
    "#a667b5",
    "#b59a2e",
    "#c0504d",
    "#5fb3b3",
    "#7a8794",
    "#8d6e63",
    "#e06c9f",
    "#2f4b7c",
    "#a3b18a",
)
"""As many as there are methods."""
Over = Literal["tokens", "seconds"]
LABELS = {"tokens": "supervised tokens seen", "seconds": "seconds of training"}
SMOOTHED = 0.8
"""Weight of the past in the smoothed training loss."""


def validation_curves(runs: Runs, over: Over) -> str:
    """Validation loss of each method, mean over seeds, with a band of one standard error and the lowest point marked.

    Args:
        runs: by method.
        over: supervised tokens or seconds.
    """

    def draw(axes: Axes) -> None:
        for colour, (method, each) in zip(COLOURS, runs.items(), strict=False):
            points = np.array(_equally_long([run.history.facts["validation"] for run in each]))  # [S, points, 2]
            numbers = points[0, :, 0].astype(int)
            x = np.mean([_progress(run, over)[numbers] for run in each], axis=0)
            mean = _band(axes, x, points[:, :, 1], colour, method, marker="o")
            lowest = int(mean.argmin())
            axes.plot(x[lowest], mean[lowest], "*", color=colour, markersize=13)
        axes.set(xlabel=LABELS[over], ylabel="validation loss, nats per token")
        axes.legend()

    return svg(draw)


def loss_curves(runs: Runs, over: Over) -> str:
    """Smoothed training loss of each method, with a band of one standard error, and its validation loss, dashed.

    Args:
        runs: by method.
        over: supervised tokens or seconds.
    """

    def draw(axes: Axes) -> None:
        for colour, (method, each) in zip(COLOURS, runs.items(), strict=False):
            smooth = [_smoothed([step["loss"] for step in steps_of(run.history)]) for run in each]
            losses = np.array(_equally_long(smooth))
            x = np.mean(_equally_long([_progress(run, over)[1:].tolist() for run in each]), axis=0)
            _band(axes, x, losses, colour, method)
            points = np.array(_equally_long([run.history.facts["validation"] for run in each]))
            if points.size:
                numbers = points[0, :, 0].astype(int)
                x = np.mean([_progress(run, over)[numbers] for run in each], axis=0)
                axes.plot(x, points[:, :, 1].mean(axis=0), "--", color=colour, marker="o", markersize=3)
        axes.set(xlabel=LABELS[over], ylabel="loss, nats per token", ylim=(0, None))
        axes.legend()

    return svg(draw)


def module_maps(runs: Runs) -> list[tuple[str, str, str]]:
    """For each method with GRIT: its name, and by layer and projection the cosine and the factors' effective rank.

    Values are those of the last step, averaged over seeds.

    Args:
        runs: by method.

    Returns:
        Method, what is shown, and the picture.
    """
    found = []
    for method, each in runs.items():
        figures = [_last_modules(run.history) for run in each]
        if not all(figures):
            continue
        for name, meaning in (
            ("cosine", "cosine between raw and preconditioned gradient"),
            ("effective_rank_h", "effective rank of the factor of A x"),
            ("effective_rank_u", "effective rank of the factor of the gradient with respect to A x"),
        ):
            values = {module: [one[module][name] for one in figures] for module in figures[0]}
            if all(value is not None for each_seed in values.values() for value in each_seed):
                means = {module: float(np.mean(each_seed)) for module, each_seed in values.items()}
                found.append((method, meaning, _map(means, meaning)))
    return found


def fault_curves(fault: FaultRun, reference: ComparedRun) -> str:
    """The study's "loss" and the honest one of the same run, and the honest one of a run without the fault.

    Args:
        fault: the reproduction.
        reference: of the same seed.
    """
    faulty, honest = steps_of(fault.history), steps_of(reference.history)

    def draw(axes: Axes) -> None:
        numbers = [step["step"] for step in faulty]
        axes.plot(numbers, [step["faulty_loss"] for step in faulty], color=COLOURS[5], label="“loss”, padding counted")
        axes.plot(numbers, [step["loss"] for step in faulty], color=COLOURS[1], label="same run, answers' tokens")
        axes.plot(
            [step["step"] for step in honest],
            [step["loss"] for step in honest],
            color=COLOURS[0],
            label=f"{reference.method}, answers' tokens",
        )
        axes.set(xlabel="optimizer step", ylabel="nats per counted token", ylim=(0, None))
        axes.legend()

    return svg(draw)


def _equally_long(each: Sequence[list[Any]]) -> list[list[Any]]:
    """Cut to the shortest, since a mean needs all seeds: some trainings may have stopped early."""
    shortest = min(map(len, each))
    return [one[:shortest] for one in each]


def _band(
    axes: Axes, x: np.ndarray, values: np.ndarray, colour: str, label: str, marker: str | None = None
) -> np.ndarray:
    """Mean and standard error over seeds; values [S, points]."""
    mean: np.ndarray = values.mean(axis=0)
    axes.plot(x, mean, color=colour, label=label, marker=marker, markersize=4)
    if len(values) > 1:
        error = values.std(axis=0, ddof=1) / np.sqrt(len(values))
        axes.fill_between(x, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
    return mean


def _progress(run: ComparedRun, over: Over) -> np.ndarray:
    """Tokens or seconds before each step and after the last, [steps + 1]."""
    name, start = ("supervised_tokens", 0.0) if over == "tokens" else ("seconds", run.history.facts["basis_seconds"])
    return np.concatenate([[start], start + np.cumsum([step[name] for step in steps_of(run.history)])])


def _smoothed(losses: Sequence[float]) -> list[float]:
    smooth, mean = [], losses[0]
    for loss in losses:
        mean = SMOOTHED * mean + (1 - SMOOTHED) * loss
        smooth.append(mean)
    return smooth


def _last_modules(history: Artifact) -> dict[str, dict[str, Any]]:
    path = history.path / "modules.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return {line["module"]: line for line in lines if line["step"] == lines[-1]["step"]}


def _map(values: dict[str, float], meaning: str) -> str:
    """By layer and projection; what has no number in its path stands in a column of its own."""
    places = {module: _place(module) for module in values}
    rows = sorted({row for _, row in places.values()})
    columns = sorted({column for column, _ in places.values()})
    grid = np.full((len(rows), len(columns)), np.nan)
    for module, (column, row) in places.items():
        grid[rows.index(row), columns.index(column)] = values[module]

    def draw(axes: Axes) -> None:
        mesh = axes.pcolormesh(np.ma.masked_invalid(grid), cmap="viridis", edgecolors="none")
        axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
        shown = range(0, len(columns), max(1, len(columns) // 10))
        axes.set_xticks([index + 0.5 for index in shown], [str(columns[index]) for index in shown])
        axes.set(xlabel="layer")
        axes.grid(visible=False)
        axes.figure.colorbar(mesh, ax=axes, label=meaning if len(meaning) < 30 else "")

    return svg(draw, (6.4, 2.6))


def _place(module: str) -> tuple[int, str]:
    number = re.search(r"\.(\d+)\.", module)
    return int(number[1]) if number else -1, module.rpartition(".")[2]
