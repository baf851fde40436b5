"""What GRIT adds to a step's time and to the peak memory, on a GPU if there is one.

Run with `python -m benchmarks.grit_overhead`. Two copies of SmolLM2-135M take the same rows, one by AdamW, one by GRIT
(its first basis found before) and AdamW, in turns and in changing order. GRIT's copy then takes some steps with a clock
on each of its parts. For its peak memory, that of finding the basis included, each method takes some steps in a process
of its own. With `--shape llama3-8b` the model is a
Llama of that shape with random weights, which needs a GPU and no download; `--shape tiny` shows in seconds that all of
this runs.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.machine import machine
from benchmarks.random_llama import SHAPES, RandomWorkload
from benchmarks.timing import Seconds, alternate, clock, timed
from benchmarks.workload import DTYPE_HELP, DTYPES, EXTRACTION, Workload, default_dtype, optimizer_step, summed_loss
from grit import GRITConfig, GRITManager, set_gradient_basis
from grit.config import Variant
from tasks.training.peak_memory import peak_memory

METHODS = ("AdamW", "GRIT")
MORE_STEPS = 10
"""Steps with the clock on each part, and steps for the peak memory."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse(argv)
    workload = workload_of(arguments)
    if arguments.memory:
        print(peak_bytes(workload, arguments.memory, arguments.variant))
        return
    print(workload.description)
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    command = [sys.executable, "-m", "benchmarks.grit_overhead", *argv, "--memory"]
    adamw, grit = (int(subprocess.check_output([*command, name])) for name in METHODS)  # while the GPU is empty
    trainers = {name: Trainer(workload, name, arguments.variant) for name in METHODS}
    print(arguments.variant, trainers["GRIT"].size, sep=", ")
    seconds = alternate(trainers, arguments.pairs)
    print(*compared(seconds), sep="\n")
    basis = trainers["GRIT"].basis_seconds
    print(f"first basis {basis:.2f} s, {basis / statistics.median(seconds['AdamW']):.2f} of AdamW's median steps")
    parts = trainers["GRIT"].parts(MORE_STEPS)
    whole = parts.pop("step")
    print(*(f"{name:<28} {value / whole:8.4f} of GRIT's time" for name, value in parts.items()), sep="\n")
    print(f"peak memory AdamW {adamw / 1e9:.3f} GB, GRIT {grit / 1e9:.3f} GB, ratio {grit / adamw:.4f}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--data", default=EXTRACTION, help="generated:extraction, or a file of instructions")
    what.add_argument("--shape", choices=SHAPES, help="random weights of this shape, and random tokens")
    parser.add_argument("--dtype", choices=DTYPES, help=DTYPE_HELP)
    parser.add_argument("--quantization", choices=("none", "nf4"), default="none", help="with --shape")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="with --shape")
    parser.add_argument("--rows-per-step", type=int, help="8, or 2 with --shape")
    parser.add_argument("--length", type=int, help="longest row in tokens: 224, or 2048 (each row's) with --shape")
    parser.add_argument("--variant", choices=get_args(Variant), default=GRITConfig().variant, help="GRIT's")
    parser.add_argument("--micro-batches", type=int, default=1, help="forward passes to a step")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--store", type=Path, default=Path(".artifacts"))
    parser.add_argument("--memory", choices=METHODS, help="only this method's peak memory in bytes, over some steps")
    arguments = parser.parse_args(argv)
    if not arguments.shape and (arguments.quantization != "none" or arguments.gradient_checkpointing):
        parser.error("--quantization and --gradient-checkpointing need --shape")
    if arguments.shape and arguments.dtype:
        parser.error("--shape has its weights in bfloat16 or NF4: leave --dtype out")
    return arguments


def workload_of(arguments: argparse.Namespace) -> Workload | RandomWorkload:
    """What the command line asks for."""
    rows, length, parts = arguments.rows_per_step, arguments.length, arguments.micro_batches
    if arguments.shape:
        return RandomWorkload(
            arguments.shape, arguments.quantization, rows or 2, length or 2048, parts, arguments.gradient_checkpointing
        )
    return Workload(
        arguments.data, arguments.store, rows or 8, length or 224, parts, arguments.dtype or default_dtype()
    )


class Trainer:
    """Takes a step with each call.

    Args:
        workload: model and rows.
        name: of the method.
        variant: GRIT's.
    """

    def __init__(self, workload: Workload | RandomWorkload, name: str, variant: Variant) -> None:
        self._network = workload.network(seed=0)
        self._weights = [weight for weight in self._network.parameters() if weight.requires_grad]
        self._optimizer = torch.optim.AdamW(self._weights, lr=1e-3)
        self._steps = workload.steps(seed=0)
        self._manager: Any = None
        self.basis_seconds = 0.0
        """What finding the first basis took."""
        if name == "GRIT":
            config = GRITConfig(variant)
            batches = [batch for step in islice(workload.steps(seed=0), config.basis_steps) for batch in step]
            started = clock()
            if config.first_basis != "initial":
                whitened = config.first_basis == "whitened_gradient"
                set_gradient_basis(
                    self._network, batches, lambda batch: summed_loss(self._network, batch), whitened=whitened
                )
            self.basis_seconds = clock() - started
            self._manager = GRITManager(self._network, config)
            self._manager.attach(self._optimizer)

    def __call__(self) -> float:
        """Take one step. Returns the loss before it."""
        return optimizer_step(self._network, next(self._steps), self._optimizer, self._manager)

    @property
    def size(self) -> str:
        """What GRIT handles."""
        modules = len(self._manager.modules) if self._manager else 0
        return f"{modules} LoRA modules, {sum(weight.numel() for weight in self._weights) / 1e6:.2f} M LoRA parameters"

    def parts(self, steps: int) -> Seconds:
        """Seconds that GRIT's parts, and the whole `step`, take in so many further steps, by name.

        On a GPU a part is waited for before the next begins, so that parts and step take longer than in a step that
        nobody watches.
        """
        manager = self._manager
        parts: Seconds = defaultdict(float)
        for group in manager.factor_groups:
            group.accumulate = timed(group.accumulate, "capture", parts)
        manager.update_and_invert_factors = timed(manager.update_and_invert_factors, "update and factorisation", parts)
        manager.precondition_gradients = timed(manager.precondition_gradients, "preconditioning", parts)
        if manager.attached:  # what its hooks do
            manager.attached.before_step = timed(manager.attached.before_step, "around the optimizer's step", parts)
            manager.attached.after_step = timed(manager.attached.after_step, "around the optimizer's step", parts)
        step = timed(self, "step", parts)
        for _ in range(steps):
            step()
        return parts


def compared(seconds: dict[str, list[float]]) -> list[str]:
    """Lines on the steps of both methods, and on the ratio of the two."""
    lines = [
        f"{name:<8} {len(values)} steps: min {min(values):.4f} s, median {statistics.median(values):.4f} s, "
        f"mean {statistics.fmean(values):.4f} s"
        for name, values in seconds.items()
    ]
    for center in (statistics.median, statistics.fmean):
        lines.append(f"ratio by {center.__name__} {center(seconds['GRIT']) / center(seconds['AdamW']):.4f}")
    ratios = [grit / adamw for grit, adamw in zip(seconds["GRIT"], seconds["AdamW"], strict=True)]
    return [
        *lines,
        f"the pairs' ratios: min {min(ratios):.4f}, median {statistics.median(ratios):.4f}, "
        f"mean {statistics.fmean(ratios):.4f}",
    ]


def peak_bytes(workload: Workload | RandomWorkload, name: str, variant: Variant) -> int:
    """Peak memory of a method while the model is made and trained."""
    with peak_memory() as peak:
        train = Trainer(workload, name, variant)
        for _ in range(MORE_STEPS):
            train()
    return peak.bytes


if __name__ == "__main__":
    main()
