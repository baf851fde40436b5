"""The curves of a comparison: losses with bands, and a faulty loss beside the honest one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes

from tasks.analysis.compared_runs import ComparedRun, FaultRun
from tasks.analysis.metric import Runs
from tasks.report.figures import PLAIN, smoothed, svg
from tasks.training.history import steps_of

COLOURS = (
    "#3b82c4",
    "#d9773a",
    "#4f9d69",
    "#a667b5",
    "#a58a1c",
    "#c0504d",
    "#2f9c9c",
    "#7a8794",
    "#8d6e63",
    "#e06c9f",
    "#5a6fc0",
    "#84944f",
)
"""As many as there are methods; each stands out at 3:1 from light and from dark paper."""
Over = Literal["tokens", "seconds"]
LABELS = {"tokens": "supervised tokens seen", "seconds": "seconds of training"}
POINTS = 400
"""Of one line, at most: ten thousand steps would make a page of megabytes, and nobody could tell them apart."""
MARKED = 50
"""Validations of a line whose points are marked, at most."""


def validation_curves(runs: Runs, over: Over, every: int | None) -> str:
    """Validation loss of each method, mean over seeds, with a band of one standard error and the lowest point marked.

    Args:
        runs: by method.
        over: supervised tokens or seconds.
        every: supervised tokens from one validation to the next, if they were set (`training.eval_tokens`).
    """

    def draw(axes: Axes) -> None:
        for colour, (method, of_method) in zip(COLOURS, runs.items(), strict=False):
            x, losses = validation_points(of_method, over, every)
            mean = _band(axes, x, losses, colour=colour, label=method, marker="o" if len(x) <= MARKED else None)
            lowest = int(mean.argmin())
            axes.plot(x[lowest], mean[lowest], "*", color=colour, markersize=13)
        axes.set(xlabel=LABELS[over], ylabel="validation loss, nats per token")
        _legend(axes)

    return svg(draw, _size(runs))


def loss_curves(runs: Runs, over: Over, every: int | None) -> str:
    """Training loss of each method, of many steps smoothed, with a band of one standard error; validation loss, dashed.

    A step's training loss is that of the weights before it, and stands there.

    Args:
        runs: by method.
        over: supervised tokens or seconds.
        every: supervised tokens from one validation to the next, if they were set (`training.eval_tokens`).
    """

    def draw(axes: Axes) -> None:
        validated = False
        for colour, (method, of_method) in zip(COLOURS, runs.items(), strict=False):
            steps = [steps_of(run.history) for run in of_method]
            losses = np.array(_equally_long([smoothed([step["loss"] for step in of_run]).tolist() for of_run in steps]))
            progress = [progress_of(run, of_run, over) for run, of_run in zip(of_method, steps, strict=True)]
            x = np.mean(_equally_long([of_run[:-1].tolist() for of_run in progress]), axis=0)
            _band(axes, x, losses, colour=colour, label=method)
            x, losses = validation_points(of_method, over, every)
            if validated := bool(losses.size):
                kept = thinned(len(x))
                marker = "o" if len(x) <= MARKED else None
                axes.plot(x[kept], losses.mean(axis=0)[kept], "--", color=colour, marker=marker, markersize=3)
        if validated:
            axes.plot([], [], "--", color=PLAIN, label="validation")
        axes.set(xlabel=LABELS[over], ylabel="loss, nats per token", ylim=(0, None))
        _legend(axes)

    return svg(draw, _size(runs))


def thinned(points: int) -> np.ndarray:
    """Which of so many points are drawn: `POINTS` at most, evenly spread, the first and the last among them."""
    return np.linspace(0, points - 1, min(points, POINTS)).round().astype(int)


def validation_points(runs: Sequence[ComparedRun], over: Over, every: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Where the validations of a method stand in its curve: those that all of its seeds have.

    Seeds reach a multiple of `every` after different steps, or two at once; it is the multiple that pairs them, and the
    last step of trainings of one length. Where one was stopped early, the curve ends there.

    Args:
        runs: of each of S seeds.
        over: supervised tokens or seconds.
        every: supervised tokens from one validation to the next; without it steps pair the seeds.

    Returns:
        Tokens or seconds, mean over seeds, [points], and validation losses, [S, points].
    """
    steps = [steps_of(run.history) for run in runs]
    whole = len({len(of_run) for of_run in steps}) == 1
    points_of_runs: list[dict[float, tuple[float, float]]] = []
    for run, own in zip(runs, steps, strict=True):
        x, tokens = progress_of(run, own, over), progress_of(run, own, "tokens")
        at: dict[float, tuple[float, float]] = {}
        for step, loss in run.history.facts["validation"]:
            mark = math.inf if whole and step == len(own) else tokens[step] // every if every else step
            at.setdefault(mark, (x[step], loss))
        points_of_runs.append(at)
    marks = [mark for mark in points_of_runs[0] if all(mark in at for at in points_of_runs)]
    points = np.array([[at[mark] for mark in marks] for at in points_of_runs]).reshape(len(runs), len(marks), 2)
    return points[:, :, 0].mean(axis=0), points[:, :, 1]


def progress_of(run: ComparedRun, steps: Sequence[dict[str, Any]], over: Over) -> np.ndarray:
    """Tokens or seconds before each step and after the last, [steps + 1].

    Args:
        run: a training.
        steps: the lines of its history.
        over: which of the two; seconds include GRIT's first basis.
    """
    name, start = ("supervised_tokens", 0.0) if over == "tokens" else ("seconds", run.history.facts["basis_seconds"])
    return np.concatenate([[start], start + np.cumsum([step[name] for step in steps])])


def fault_curves(fault: FaultRun, reference: ComparedRun) -> str:
    """The study's "loss" and the honest one of the same run, and the honest one of a run without the fault.

    Args:
        fault: the reproduction.
        reference: of the same seed.
    """
    faulty, honest = steps_of(fault.history), steps_of(reference.history)

    def draw(axes: Axes) -> None:
        for steps, name, colour, label in (
            (faulty, "faulty_loss", COLOURS[5], "“loss”, padding counted"),
            (faulty, "loss", COLOURS[1], "same run, answers' tokens"),
            (honest, "loss", COLOURS[0], f"{reference.method}, answers' tokens"),
        ):
            shown = [steps[index] for index in thinned(len(steps))]
            axes.plot([step["step"] for step in shown], [step[name] for step in shown], color=colour, label=label)
        axes.set(xlabel="optimizer step", ylabel="nats per counted token", ylim=(0, None))
        axes.legend()

    return svg(draw)


def _equally_long(seeds: Sequence[list[Any]]) -> list[list[Any]]:
    """Cut to the shortest, since a mean needs all seeds: some trainings may have stopped early."""
    shortest = min(map(len, seeds))
    return [values[:shortest] for values in seeds]


def _band(
    axes: Axes, x: np.ndarray, values: np.ndarray, *, colour: str, label: str, marker: str | None = None
) -> np.ndarray:
    """Mean and standard error over seeds; values [S, points]."""
    mean: np.ndarray = values.mean(axis=0)
    kept = thinned(len(x))
    axes.plot(x[kept], mean[kept], color=colour, label=label, marker=marker, markersize=4)
    if len(values) > 1:
        error = values.std(axis=0, ddof=1) / np.sqrt(len(values))
        low, high = (mean - error)[kept], (mean + error)[kept]
        axes.fill_between(x[kept], low, high, color=colour, alpha=0.2, linewidth=0)
    return mean


def _size(runs: Runs) -> tuple[float, float]:
    """Inches; higher where the legend has many lines."""
    return 6.4, 3.4 + 0.22 * max(0, math.ceil(len(runs) / 3) - 1)


def _legend(axes: Axes) -> None:
    """Below the axes where it would hide the curves."""
    names = axes.get_legend_handles_labels()[1]
    if len(names) > 4:
        axes.figure.legend(loc="outside lower center", ncols=3)
    else:
        axes.legend()
