"""Seconds of single steps and of their parts, the GPU's work included."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tqdm import tqdm

Seconds = dict[str, float]
WARM_UP = 3
"""Pairs that are not counted: memory is allocated, and kernels are chosen, in the first steps."""


def clock() -> float:
    """Seconds on a clock that only goes forward, read when the GPU has done all that it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(function: Callable[..., Any], name: str, seconds: Seconds) -> Callable[..., Any]:
    """The function, adding what each call takes to `seconds[name]`."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        started = clock()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[name] += clock() - started

    return call


def alternate(steps: Mapping[str, Callable[[], Any]], pairs: int) -> dict[str, list[float]]:
    """Take steps in turns, so that another program's load hits all alike, in an order that changes with each pair.

    Args:
        steps: takes one step, by name.
        pairs: how many of each are counted, after `WARM_UP` others.

    Returns:
        Seconds of each counted step, by name, in the order of the pairs.
    """
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for pair in tqdm(range(pairs + WARM_UP), unit="pair"):
        for name in names if pair % 2 else reversed(names):
            started = clock()
            steps[name]()
            seconds[name].append(clock() - started)
    return {name: values[WARM_UP:] for name, values in seconds.items()}
