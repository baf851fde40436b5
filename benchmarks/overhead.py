"""What Prefect, hashing and caching add to a run: the same stages as a flow and as plain functions, in turn.

Run with `python -m benchmarks.overhead [--preset demo] [--pairs 1]`. Each run starts from an empty store; the base
model is fetched once before and is not counted, since its conversion is the same for both.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from flows.finetune import finetune, stages
from tasks.presets import load_settings
from tasks.stage import without_prefect


def plain(preset: str, store: Path) -> float:
    """Seconds of the stages called as plain functions."""
    settings = load_settings(preset, _overrides(store))
    started = time.perf_counter()
    with without_prefect():
        stages(settings)
    return time.perf_counter() - started


def as_flow(preset: str, store: Path) -> float:
    """Seconds of the same stages as a Prefect flow with its temporary server, caching on."""
    started = time.perf_counter()
    finetune(preset, "grit", _overrides(store))
    return time.perf_counter() - started


def _overrides(store: Path) -> dict[str, object]:
    return {"method": "grit", "store": str(store), "ollama.target": "none"}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--pairs", type=int, default=1)
    arguments = parser.parse_args()
    ratios = []
    with tempfile.TemporaryDirectory() as scratch:
        for pair in range(arguments.pairs):
            seconds = {}
            order = [("plain", plain), ("flow", as_flow)]
            for name, measure in order if pair % 2 == 0 else reversed(order):
                store = Path(scratch) / "store"
                seconds[name] = measure(arguments.preset, store)
                shutil.rmtree(store, ignore_errors=True)
            ratios.append(seconds["flow"] / seconds["plain"])
            print(f"plain {seconds['plain']:.1f} s, flow {seconds['flow']:.1f} s, ratio {ratios[-1]:.3f}")
    median = statistics.median(ratios)
    print(f"median ratio flow / plain over {len(ratios)} pairs of preset {arguments.preset}: {median:.3f}")


if __name__ == "__main__":
    main()
