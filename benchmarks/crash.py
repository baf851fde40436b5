"""A run that is killed at random moments in every stage and started again each time, against one left in peace.

Run with `python -m benchmarks.crash [--preset demo] [--kills 20] [--set training.max_steps=8 ...]`. Each kill is a
SIGKILL to the run, its training and its temporary Prefect server. The runs must end with the same GGUF, byte for byte,
no stage that had finished may be computed again, and there must be as many kills as were asked for; otherwise the exit
status is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

STAGES = (
    *(
        "fetch_model",
        "fetch_data",
        "prepare_dataset",
        "check_vocabulary",
        "score",
        "train",
        "merge",
        "score",
        "convert",
    ),
    *("check_fidelity", "register", "promote", "write_report"),
)
SHARE = {"train": 5}
"""Kills in a stage for two in each of the others."""
MOST_RUNS = 4
"""A run that ends before it is hit in all stages is followed by another."""
ENDED = re.compile(r"^(\w+)(?: \(tuned\))? +(cached|\d\S* .+?)   ", re.MULTILINE)
"""The line of a stage that has ended: its name, and its time."""


@dataclass(frozen=True)
class Kill:
    """One kill."""

    seconds: float
    """Since the attempt was started."""
    stage: str
    step: int
    """Of the training, if it was at it."""
    lost: float
    """Seconds since the last stage or checkpoint was finished."""


class Run:
    """One store, and the runs that work on it.

    Args:
        directory: where the store, Prefect's database and the output of the runs are kept.
        options: of the command line.
    """

    def __init__(self, directory: Path, options: list[str]) -> None:
        self.directory, self.store, self.output = directory, directory / "store", directory / "output"
        self.command = [sys.executable, "-m", "flows.finetune", *options, "--store", str(self.store)]
        self.command += ["--ollama.models", str(directory / "ollama"), "--training.save_steps", "2"]
        self.durations = dict.fromkeys(range(len(STAGES)), 0.0)
        self.repeated: list[str] = []

    def attempt(self, target: int | None = None, share: float = 0.0) -> Kill | None:
        """Start the run; kill it when it has been in a stage for a share of the time that this stage takes.

        Args:
            target: the stage's index; none to let the run end.
            share: of the stage's time.

        Returns:
            The kill; none if the run ended.

        Raises:
            RuntimeError: the run ended badly.
        """
        self.directory.mkdir(exist_ok=True)
        before = Counter(path.name.rpartition("-")[0] for path in self.store.glob("results/*"))
        environment = os.environ | {"PREFECT_HOME": str(self.directory / "prefect")}
        with self.output.open("w") as output:
            process = subprocess.Popen(self.command, stdout=output, stderr=output, env=environment)
        started = reached = time.monotonic()
        index = 0
        while process.poll() is None:
            ended = ENDED.findall(self.output.read_text(errors="replace"))
            if len(ended) > index:
                now = time.monotonic()
                if target is None:
                    self.durations[index] = now - reached
                index, reached = len(ended), now
            if target is not None and index >= target and time.monotonic() - reached >= share * self.durations[target]:
                self._kill(process)
                break
            time.sleep(0.02)
        self._count_repeated(before)
        if process.wait() == 0:
            return None
        if target is None or process.returncode > 0:
            raise RuntimeError(self.output.read_text(errors="replace")[-2000:])
        written = [path.stat().st_mtime for path in self.store.glob("checkpoints/*/checkpoint-*")]
        checkpoint = time.time() - max(written, default=0.0)
        lost = min(time.monotonic() - reached, checkpoint if index == STAGES.index("train") else math.inf)
        return Kill(
            time.monotonic() - started,
            (*STAGES, "the end")[index] if index else "start-up or fetch_model",
            self._step(),
            lost,
        )

    def gguf_sha256(self) -> str:
        """Of the one GGUF that the store holds."""
        (path,) = self.store.glob("gguf/*/model.gguf")
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for member in family:
            member.kill()
        process.wait()  # before psutil, which would take the exit status for itself
        psutil.wait_procs(family)

    def _count_repeated(self, before: Counter[str]) -> None:
        """Note the stages that were computed although their records were there when the attempt began."""
        seen: Counter[str] = Counter()
        for name, state in ENDED.findall(self.output.read_text(errors="replace")):
            seen[name] += 1
            if state != "cached" and before[name] >= seen[name]:
                self.repeated.append(name)

    def _step(self) -> int:
        histories = sorted(self.store.glob("drafts/history-*/history.jsonl"), key=lambda path: path.stat().st_mtime)
        return len(histories[-1].read_text().splitlines()) if histories else 0


def main() -> int:
    """Run, kill, compare and print; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="single settings over the preset's")
    arguments = parser.parse_args()
    options = ["--preset", arguments.preset]
    for setting in arguments.set:
        name, _, value = setting.partition("=")
        options += [f"--{name}", value]
    random.seed(arguments.seed)
    weights = [SHARE.get(stage, 2) for stage in STAGES]
    owed = Counter({index: math.ceil(arguments.kills * weight / sum(weights)) for index, weight in enumerate(weights)})
    kills: list[Kill] = []
    disturbed: list[Run] = []
    with tempfile.TemporaryDirectory() as directory:
        undisturbed = Run(Path(directory) / "undisturbed", options)
        started = time.monotonic()
        undisturbed.attempt()
        peace = time.monotonic() - started
        started = time.monotonic()
        with tqdm(total=owed.total(), unit="kill") as bar:
            while owed.total() and len(disturbed) < MOST_RUNS:
                disturbed.append(Run(Path(directory) / f"disturbed-{len(disturbed)}", options))
                disturbed[-1].durations = undisturbed.durations
                kills += disturb(disturbed[-1], owed, bar)
        trouble = time.monotonic() - started
        same = {run.gguf_sha256() for run in disturbed} == {undisturbed.gguf_sha256()}
        left = [path for run in disturbed for path in run.store.glob("drafts/*")]
        bytes_left = sum(file.stat().st_size for path in left for file in path.rglob("*") if file.is_file())
    show(kills)
    lost = [kill.lost for kill in kills]
    repeated = [name for run in disturbed for name in run.repeated]
    print(f"{len(kills)} kills of {len(disturbed)} runs: {dict(Counter(kill.stage for kill in kills))}")
    print(f"undisturbed {peace:.0f} s, disturbed {trouble:.0f} s; each restart takes some seconds of its own")
    print(f"work lost: {sum(lost):.0f} s in all, median {statistics.median(lost):.1f} s, most {max(lost):.1f} s")
    print(f"left behind: {len(left)} drafts, {bytes_left / 1e6:.1f} MB (`make clean-artifacts` removes them)")
    print(f"the same GGUF: {same}; finished stages computed again: {repeated or 'none'}")
    return 0 if same and not repeated and len(kills) >= arguments.kills else 1


def disturb(run: Run, owed: Counter[int], bar: tqdm[Any]) -> list[Kill]:
    """Kill a run in each stage as often as is owed, and let it end.

    Args:
        run: which has not been started.
        owed: kills by the stage's index; those that were made are taken off. A run that ends before it is hit leaves
            the rest to the next.
        bar: shows the kills.
    """
    kills: list[Kill] = []
    for target in sorted(owed.elements()):
        kill = run.attempt(target, random.random())  # noqa: S311, no secret
        if kill is None:
            return kills
        kills.append(kill)
        owed[target] -= 1
        bar.update()
    run.attempt()
    return kills


def show(kills: list[Kill]) -> None:
    """Print a line for each kill."""
    table = Table("killed after", "in", "at step", "lost")
    for kill in kills:
        table.add_row(f"{kill.seconds:.1f} s", kill.stage, str(kill.step or ""), f"{kill.lost:.1f} s")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
