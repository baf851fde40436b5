"""Which method lowers the validation loss fastest, each at its own best learning rate.

Run with `python -m benchmarks.grit_convergence --data generated:extraction --results FILE`. Every method trains at each
learning rate with seed 0, in turns; at the rate with the lowest final validation loss it trains again with the other
seeds, which alone enter the table. A seed rules the adapter and the order of the rows, the same for all methods. Each
finished training is a line of the results file; a second call goes on where the first ended. Trainings of another
setup (data, steps, rows, dtype, validations) may stand in the same file. A second data set is `--data FILE`, such as
`alpaca_en_800.json`: a JSON list of rows with `instruction`, `input` and `output`, of which a tenth is held out.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import os
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import get_scheduler

from benchmarks.contenders import ABLATIONS, METHODS, make
from benchmarks.machine import machine
from benchmarks.timing import clock
from benchmarks.workload import DTYPE_HELP, DTYPES, EXTRACTION, Workload, default_dtype, optimizer_step
from tasks.engine.errors import TrainingError

ALL = METHODS | ABLATIONS
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
SETUP = ("data", "steps", "rows_per_step", "max_length", "validation_rows", "dtype", "validations")
"""Trainings that agree in these can be compared."""
BEFORE = {"dtype": "bfloat16", "validations": 3}
"""What holds for lines that do not say it."""


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default=EXTRACTION, help="generated:extraction, or a file of instructions")
    parser.add_argument("--results", type=Path, required=True, help="JSON Lines, appended to")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=ALL, metavar="METHOD")
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3], help="at the best rate; 0 serves the choice")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rows-per-step", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=160)
    parser.add_argument("--validation-rows", type=int, default=24)
    parser.add_argument("--dtype", choices=DTYPES, default=default_dtype(), help=DTYPE_HELP)
    parser.add_argument("--validations", type=int, default=3, help="in each training, evenly spaced, one at its end")
    parser.add_argument("--store", type=Path, default=Path(".artifacts"))
    parser.add_argument(
        "--processes",
        type=int,
        default=1 if torch.cuda.is_available() else os.cpu_count(),
        help="trainings side by side, a thread each (1 with a GPU, where one training has all threads)",
    )
    parser.add_argument("--ablations", action="store_true", help="the changes to kfac^1/2 in place of the methods")
    arguments = parser.parse_args(argv)
    if arguments.ablations:
        arguments.methods = list(ABLATIONS)
    setup = {name: getattr(arguments, name) for name in SETUP} | {"data": Path(arguments.data).name}
    workload = Workload(
        arguments.data, arguments.store, arguments.rows_per_step, arguments.max_length, dtype=arguments.dtype
    )
    tuning = [
        (method, round(rate * ALL[method].rate_factor, 12), 0)
        for rate in arguments.rates
        for method in arguments.methods
    ]
    print(f"{', '.join(arguments.methods)} at {arguments.rates}: {setup}")
    run(tuning, workload, setup, arguments.results, arguments.processes)
    best = best_rates([training for training in read(arguments.results) if matches(training, setup)])
    final = [(method, best[method], seed) for seed in arguments.seeds for method in arguments.methods if method in best]
    run(final, workload, setup, arguments.results, arguments.processes)


def run(
    jobs: list[tuple[str, float, int]], workload: Workload, setup: dict[str, Any], results: Path, processes: int
) -> None:
    """Train those jobs that the results file does not hold, some of them side by side."""
    finished = [training for training in read(results) if matches(training, setup)]
    done = {(training["method"], training["rate"], training["seed"]) for training in finished}
    missing = [job for job in jobs if job not in done]
    if not missing:
        return
    results.parent.mkdir(parents=True, exist_ok=True)
    for result in tqdm(_trained(missing, workload, setup, processes), total=len(missing), unit="training"):
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


def _trained(
    jobs: list[tuple[str, float, int]], workload: Workload, setup: dict[str, Any], processes: int
) -> Iterator[dict[str, Any]]:
    """Results, each as soon as its training ends."""
    if processes == 1:
        for job in jobs:
            yield train(*job, workload, setup)
            gc.collect()  # hooks refer to their model, and the model to its hooks
        return
    os.environ["TQDM_DISABLE"] = "1"  # in the processes to come; one bar is enough
    # One thread to a process: two trainings side by side disturb each other less than two threads of each would.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, torch.set_num_threads, (1,)) as pool:
        futures = [pool.submit(train, *job, workload, setup) for job in jobs]
        yield from (future.result() for future in as_completed(futures))


def train(name: str, rate: float, seed: int, workload: Workload, setup: dict[str, Any]) -> dict[str, Any]:
    """One training.

    Returns:
        The setup, the machine, the training losses, validation losses and seconds by step, and with GRIT the mean rank
        at the end.
    """
    contender = make(ALL[name], workload, rate, seed)
    optimizer, steps = contender.optimizer, setup["steps"]
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=3, num_training_steps=steps)
    validated = {round(steps * part / setup["validations"]) for part in range(1, setup["validations"] + 1)}
    result: dict[str, Any] = {**setup, "method": name, "rate": rate, "seed": seed, "start_seconds": contender.seconds}
    result["machine"] = machine()
    validation = {}
    losses, seconds = [], [0.0]
    for step, batches in zip(range(1, steps + 1), workload.steps(seed), strict=False):
        started = clock()
        losses.append(optimizer_step(contender.network, batches, optimizer, contender.manager))
        schedule.step()
        seconds.append(clock() - started)
        if not math.isfinite(losses[-1]):
            break
        if step in validated:
            try:
                validation[step] = workload.validate(contender.network, setup["validation_rows"])
            except TrainingError:  # diverged: a finding, and no reason to end the others
                break
    if contender.manager:
        result["rank"] = statistics.fmean(contender.manager.ranks.values())
    return result | {"losses": losses, "validation": validation, "seconds": seconds}


def read(path: Path) -> list[dict[str, Any]]:
    """All finished trainings; validation losses by step."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    trainings = [json.loads(line) for line in lines]
    for training in trainings:
        training.update(BEFORE | training)
        training["validation"] = {int(step): loss for step, loss in training["validation"].items()}
        training["rate"] = round(training["rate"], 12)  # 0.1 x 0.003 is 0.0003
    return trainings


def matches(training: dict[str, Any], setup: dict[str, Any]) -> bool:
    """Whether a training belongs to this comparison."""
    return all(training[name] == value for name, value in setup.items())


def final_loss(training: dict[str, Any]) -> float:
    """Validation loss after the last step; infinite where training diverged."""
    return float(training["validation"].get(training["steps"], math.inf))


def best_rates(trainings: list[dict[str, Any]]) -> dict[str, float]:
    """The learning rate of each method with the lowest final validation loss with seed 0."""
    tuned: dict[str, dict[str, Any]] = {}
    for training in trainings:
        method = training["method"]
        if training["seed"] == 0 and (method not in tuned or final_loss(training) < final_loss(tuned[method])):
            tuned[method] = training
    return {method: training["rate"] for method, training in tuned.items()}


if __name__ == "__main__":
    main()
