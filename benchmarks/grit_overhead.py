"""What GRIT adds to a step's time and to the peak memory.

Run with `python -m benchmarks.grit_overhead`. Two copies of SmolLM2-135M with equal adapters take the same rows, one by
AdamW, one by GRIT and AdamW, in turns and in changing order; the ratio is that of the median steps. Then each method
takes some steps in a process of its own, for its peak memory.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.overhead import timed
from benchmarks.workload import EXTRACTION, Workload, optimizer_step
from grit import GRITConfig, GRITManager
from tasks.memory import peak_memory

METHODS = ("AdamW", "GRIT")
WARM_UP = 3


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default=EXTRACTION, help="generated:extraction, or a file of instructions")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--store", type=Path, default=Path(".artifacts"))
    parser.add_argument("--memory", choices=METHODS, help="only this method's peak memory, over 10 steps")
    arguments = parser.parse_args()
    workload = Workload(arguments.data, arguments.store, micro_batches=arguments.micro_batches)
    if arguments.memory:
        with peak_memory() as peak:
            train = trainer(workload, arguments.memory)
            for _ in range(10):
                train()
        print(peak.bytes)
        return
    parts: dict[str, float] = defaultdict(float)
    trainers = {name: trainer(workload, name, parts) for name in METHODS}
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    for pair in range(arguments.pairs + WARM_UP):
        if pair == WARM_UP:
            parts.clear()
        for name in METHODS if pair % 2 else reversed(METHODS):
            started = time.perf_counter()
            trainers[name]()
            seconds[name].append(time.perf_counter() - started)
    kept = {name: values[WARM_UP:] for name, values in seconds.items()}
    print(f"{arguments.pairs} pairs of steps, {arguments.data}, {torch.get_num_threads()} threads")
    for name, values in kept.items():
        print(f"{name:<8} median {statistics.median(values):.3f} s, mean {statistics.fmean(values):.3f} s")
    for center in (statistics.median, statistics.fmean):
        print(f"ratio by {center.__name__} {center(kept['GRIT']) / center(kept['AdamW']):.4f}")
    ratios = [grit / adamw for grit, adamw in zip(kept["GRIT"], kept["AdamW"], strict=True)]
    print(f"median of the pairs' ratios {statistics.median(ratios):.4f}")
    for name, value in parts.items():
        print(f"{name:<28} {value / sum(kept['GRIT']):8.4f} of GRIT's time")
    command = [sys.executable, "-m", "benchmarks.grit_overhead", "--data", arguments.data, "--store", arguments.store]
    command += ["--micro-batches", str(arguments.micro_batches), "--memory"]
    peaks = [int(subprocess.check_output([*command, name])) for name in METHODS]
    print(f"peak memory {peaks[0] / 1e9:.3f} GB and {peaks[1] / 1e9:.3f} GB, ratio {peaks[1] / peaks[0]:.4f}")


def trainer(workload: Workload, name: str, parts: dict[str, float] | None = None) -> Any:
    """A function that takes one step by the method of that name."""
    network = workload.network(seed=0)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-3)
    manager = GRITManager(network, GRITConfig()) if name == "GRIT" else None
    if manager and parts is not None:
        for group in manager._groups:
            group._accumulate = timed(group._accumulate, "capture", parts)
        manager.update_and_invert_factors = timed(manager.update_and_invert_factors, "update and factorisation", parts)
        manager.precondition_gradients = timed(manager.precondition_gradients, "preconditioning", parts)
    steps = workload.steps(seed=0)
    return lambda: optimizer_step(network, next(steps), optimizer, manager)


if __name__ == "__main__":
    main()
