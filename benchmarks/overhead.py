"""What Prefect, hashing and caching add: the flow against the same stages called as plain functions.

Run with `python -m benchmarks.overhead [--preset demo] [--pairs 1] [--set training.max_steps=5 ...]`. Each run begins
with an empty store; flow and plain functions take turns, and so does the order within a pair. Whole runs differ by some
per cent for other reasons, so the flow's own time is measured too: all that is not spent within the stages' functions
(the temporary server's start included), plus what hashing and showing the progress take within them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from benchmarks.timing import Seconds, timed
from flows import finetune as flow_module
from flows.finetune import finetune, stages
from tasks.engine import artifacts
from tasks.engine.planning import without_prefect
from tasks.engine.stage import Stage
from tasks.settings.presets import Overrides, given, load_settings
from tasks.training.progress import ProgressArtifact


def seconds_of(run: Callable[[dict[str, Any]], Any], overrides: dict[str, Any]) -> float:
    """Run with an empty store and return the seconds that it took."""
    with tempfile.TemporaryDirectory() as store:
        started = time.perf_counter()
        run({**overrides, "store": store, "ollama.models": f"{store}/ollama"})
        return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--method", default="grit", choices=("baseline", "grit"))
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="single settings over the preset's")
    arguments = parser.parse_args()
    overrides = dict(assignment.split("=", 1) for assignment in arguments.set)
    within_stages: Seconds = defaultdict(float)
    within: Seconds = defaultdict(float)
    for value in vars(flow_module).values():
        if isinstance(value, Stage):
            value.function = timed(value.function, value.name, within_stages)
    ProgressArtifact.show = timed(ProgressArtifact.show, "progress", within)  # type: ignore[method-assign]
    hashing = artifacts.file_sha256

    def as_flow(overrides: dict[str, Any]) -> None:
        artifacts.file_sha256 = timed(hashing, "hashing", within)
        finetune(arguments.preset, arguments.method, Overrides.model_validate(given(overrides)))
        artifacts.file_sha256 = hashing

    def as_functions(overrides: dict[str, Any]) -> None:
        flows_own = dict(within_stages)
        with without_prefect():
            stages(load_settings(arguments.preset, {**overrides, "method": arguments.method}))
        within_stages.update(flows_own)

    times: dict[str, list[float]] = {"flow": [], "plain functions": []}
    for pair in range(arguments.pairs):
        for name in sorted(times, reverse=pair % 2 == 1):
            times[name].append(seconds_of(as_flow if name == "flow" else as_functions, overrides))
    print(f"{arguments.pairs} pairs of whole runs, {arguments.preset} {' '.join(arguments.set)}, medians")
    for name, measured in times.items():
        print(f"  {name:<18} {statistics.median(measured):8.1f} s")
    print(f"  {'ratio':<18} {statistics.median(times['flow']) / statistics.median(times['plain functions']):8.4f}")
    print("within the flow's runs, means")
    for name, seconds in [*within_stages.items(), *within.items()]:
        print(f"  {name:<18} {seconds / arguments.pairs:8.1f} s")
    total = statistics.mean(times["flow"])
    plain = (sum(within_stages.values()) - sum(within.values())) / arguments.pairs
    print(f"  {'Prefect and cache':<18} {total - plain:8.1f} s")
    print(f"  {'ratio':<18} {total / plain:8.4f}")


if __name__ == "__main__":
    main()
