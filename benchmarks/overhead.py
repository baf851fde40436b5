"""What Prefect, hashing and caching add to a run, measured in that run.

Run with `python -m benchmarks.overhead [--preset demo]`. The flow runs once, from an empty store, with its temporary
server. Overhead is all of its time that is not spent within the stages' own functions, plus what hashing the artifacts
and showing the progress take within them; the ratio is the whole time over that of the plain functions.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from flows import finetune as flow_module
from flows.finetune import finetune
from tasks import artifacts
from tasks.stage import Stage
from tasks.training_record import ProgressArtifact


def timed(function: Callable[..., Any], name: str, seconds: dict[str, float]) -> Callable[..., Any]:
    """The function, adding what each call takes to `seconds[name]`."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[name] += time.perf_counter() - started

    return call


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--method", default="grit", choices=("baseline", "grit"))
    arguments = parser.parse_args()
    stages: dict[str, float] = defaultdict(float)
    within: dict[str, float] = defaultdict(float)
    for value in vars(flow_module).values():
        if isinstance(value, Stage):
            value.task.fn = timed(value.function, value.name, stages)
    ProgressArtifact.show = timed(ProgressArtifact.show, "progress", within)  # type: ignore[method-assign]
    artifacts.file_sha256 = timed(artifacts.file_sha256, "hashing", within)
    with tempfile.TemporaryDirectory() as store:
        started = time.perf_counter()
        finetune(arguments.preset, arguments.method, {"store": store, "ollama.models": f"{store}/ollama"})
        total = time.perf_counter() - started
    for name, seconds in [*stages.items(), *within.items()]:
        print(f"{name:<18} {seconds:8.1f} s")
    plain = sum(stages.values()) - sum(within.values())
    print(f"{'plain functions':<18} {plain:8.1f} s")
    print(f"{'Prefect and cache':<18} {total - plain:8.1f} s")
    print(f"{'ratio':<18} {total / plain:8.4f}")


if __name__ == "__main__":
    main()
