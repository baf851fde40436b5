"""The report's pictures, as SVG that is legible on light and on dark paper."""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

TRAINING, VALIDATION, PLAIN = "#3b82c4", "#d9773a", "#7a8794"
SMOOTHED = 50
"""A smoothed curve averages over a fiftieth of its steps to either side."""

_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "report",  # the same bytes for the same data
    "text.color": PLAIN,
    "axes.labelcolor": PLAIN,
    "axes.edgecolor": PLAIN,
    "xtick.color": PLAIN,
    "ytick.color": PLAIN,
    "grid.color": PLAIN,
    "grid.alpha": 0.25,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "font.size": 10,
}


def loss_curve(steps: Sequence[dict[str, Any]], validation: Sequence[Sequence[float]]) -> str:
    """Training loss of each step, of many steps smoothed as well, and the validation loss where it was measured.

    A step's training loss is that of the weights before it, and stands there.

    Args:
        steps: lines of the history.
        validation: pairs of step and loss.
    """
    done, losses = [step["step"] - 1 for step in steps], [step["loss"] for step in steps]

    def draw(axes: Axes) -> None:
        axes.plot(done, losses, color=TRAINING, alpha=0.35, linewidth=1, label="training, each step")
        if len(losses) >= SMOOTHED:
            axes.plot(done, smoothed(losses), color=TRAINING, linewidth=2, label="training, smoothed")
        if validation:
            axes.plot(*zip(*validation, strict=True), "o--", color=VALIDATION, label="validation")
        axes.set(xlabel="optimizer steps done", ylabel="nats per supervised token", ylim=(0, None))
        axes.legend()

    return svg(draw)


def smoothed(losses: Sequence[float]) -> np.ndarray:
    """The mean over each step's neighbours, as many before as after it, so that the curve does not lag; [steps].

    At the ends there are fewer on one side. Of less than `SMOOTHED` steps nothing is smoothed.

    Args:
        losses: of each step.
    """
    reach = len(losses) // SMOOTHED
    window = np.ones(2 * reach + 1)
    inner = [np.convolve(values, window)[reach : reach + len(losses)] for values in (losses, np.ones(len(losses)))]
    return np.asarray(inner[0] / inner[1])


def gradient_curve(steps: Sequence[dict[str, Any]]) -> str:
    """Gradient norm before clipping and, with GRIT, that of the preconditioned gradient and the cosine between the two.

    Variants whose preconditioned gradient is written in another basis have no cosine. Both norms are LoRA's.

    Args:
        steps: lines of the history.
    """
    numbers = [step["step"] for step in steps]

    def draw(axes: Axes) -> None:
        norms = [step["grad_norm"] for step in steps]
        ratios = [step["grit"]["norm_ratio"] for step in steps if "grit" in step]
        if all(math.isclose(ratio, 1, rel_tol=1e-3) for ratio in ratios):
            axes.plot(
                numbers, norms, color=TRAINING, label="gradient norm" + (", also preconditioned" if ratios else "")
            )
        else:
            axes.plot(numbers, norms, color=TRAINING, label="gradient norm")
            preconditioned = [norm * ratio for norm, ratio in zip(norms, ratios, strict=True)]
            axes.plot(numbers, preconditioned, color=TRAINING, linestyle=":", label="preconditioned")
        log_scale(axes)
        axes.set(xlabel="optimizer step", ylabel="norm before clipping")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        handles = axes.get_lines()
        if "cosine" in steps[-1].get("grit", {}):
            right = axes.twinx()
            right.plot(numbers, [step["grit"]["cosine"] for step in steps], color=VALIDATION, label="cosine")
            right.set(ylabel="cosine, raw to preconditioned", ylim=(0, 1.02))
            right.grid(visible=False)
            handles = [*handles, *right.get_lines()]
        axes.legend(handles=handles)

    return svg(draw)


def factors_curve(steps: Sequence[dict[str, Any]]) -> str:
    """Largest condition number of GRIT's damped factors, and the share of modules in which they are in use.

    Args:
        steps: lines of the history, with `grit` in each.
    """
    numbers = [step["step"] for step in steps]

    def draw(axes: Axes) -> None:
        axes.margins(y=0.25)  # apart from the line at 100 %
        for side, line in (("a", "--"), ("b", "-")):
            conditions = [step["grit"][f"condition_{side}"] for step in steps]
            axes.plot(numbers, conditions, line, color=TRAINING, label=f"condition number, {side.upper()}")
        log_scale(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="optimizer step", ylabel="largest condition number")
        right = axes.twinx()
        right.plot(numbers, [step["grit"]["in_use"] for step in steps], color=VALIDATION, label="modules in use")
        right.set(ylabel="share of modules in use", ylim=(0, 1.02))
        right.grid(visible=False)
        axes.legend(handles=[*axes.get_lines(), *right.get_lines()])

    return svg(draw)


def length_histogram(histogram: dict[str, Sequence[int]]) -> str:
    """Training rows by length.

    Args:
        histogram: `edges` in tokens, one more than `counts`.
    """

    def draw(axes: Axes) -> None:
        axes.stairs(histogram["counts"], histogram["edges"], fill=True, color=TRAINING, alpha=0.8)
        axes.set(xlabel="tokens in a row", ylabel="training rows")

    return svg(draw)


def log_scale(axes: Axes) -> None:
    """Make the vertical axis logarithmic, with some plain numbers; to be called when all is drawn on it."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    by_decade = LogLocator(subs=(1,) if high > 1000 * low else (1, 2, 5))
    axes.yaxis.set_major_locator(by_decade if high > 10 * low else MaxNLocator(5))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def svg(draw: Callable[[Axes], None], size: tuple[float, float] = (6.4, 3.4)) -> str:
    """Draw one picture.

    Args:
        draw: draws into empty axes.
        size: width and height in inches.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    picture = text.getvalue()[text.getvalue().index("<svg") :]
    # Names within a page are shared by all of its pictures.
    prefix = hashlib.sha256(picture.encode()).hexdigest()[:8]
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>p{prefix}-", picture)
