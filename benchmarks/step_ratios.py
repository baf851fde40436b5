"""How long a step of each method takes, as a multiple of AdamW's.

Run with `python -m benchmarks.step_ratios --out FILE.json`. Each method takes steps in turns with AdamW, in one process
and on the same rows, so that it does not matter what else the machine does; the ratio is the median of the pairs'.
Methods that differ only in where they start share one ratio. `convergence_report --step-ratios FILE.json` turns steps
into time with it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.contenders import METHODS, Method, make
from benchmarks.grit_convergence import ALL
from benchmarks.machine import machine
from benchmarks.timing import alternate
from benchmarks.workload import DTYPE_HELP, DTYPES, EXTRACTION, Workload, default_dtype, optimizer_step


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON")
    parser.add_argument("--data", default=EXTRACTION, help="generated:extraction, or a file of instructions")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=ALL, metavar="METHOD")
    parser.add_argument("--rows-per-step", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=160)
    parser.add_argument("--dtype", choices=DTYPES, default=default_dtype(), help=DTYPE_HELP)
    parser.add_argument("--threads", type=int, default=1, help="as many as each training of grit_convergence has")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--store", type=Path, default=Path(".artifacts"))
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    workload = Workload(
        arguments.data, arguments.store, arguments.rows_per_step, arguments.max_length, dtype=arguments.dtype
    )
    measured = {_running(Method()): 1.0}
    ratios: dict[str, float] = {}
    for name in arguments.methods:
        method = _running(ALL[name])
        if method not in measured:
            measured[method] = ratio(method, workload, arguments.pairs)
        ratios[name] = measured[method]
        print(f"{name:<32} {ratios[name]:.4f}", flush=True)
    report = {"what": workload.description, "pairs": arguments.pairs, "machine": machine(), "ratios": ratios}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1), encoding="utf-8")


def ratio(method: Method, workload: Workload, pairs: int) -> float:
    """Median over the pairs of what a step takes in units of AdamW's."""
    seconds = alternate({"AdamW": _stepper(Method(), workload), "other": _stepper(method, workload)}, pairs)
    return statistics.median(other / adamw for adamw, other in zip(seconds["AdamW"], seconds["other"], strict=True))


def _running(method: Method) -> Method:
    """The method without what has no part in the time of its steps."""
    return replace(method, start="default", basis_batches=Method.basis_batches, rate_factor=1.0)


def _stepper(method: Method, workload: Workload) -> Callable[[], float]:
    contender, steps = make(method, workload, rate=1e-3, seed=0), workload.steps(seed=0)
    return lambda: optimizer_step(contender.network, next(steps), contender.optimizer, contender.manager)


if __name__ == "__main__":
    main()
