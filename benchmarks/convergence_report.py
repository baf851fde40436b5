"""Tables and pictures from the results of `grit_convergence`.

Run with `python -m benchmarks.convergence_report FILE.jsonl --picture OUT.png`. For each setup in the file, the first
table is the tuning (seed 0, every learning rate), the second the trainings with other seeds, each against AdamW with
the same seed, the third the ablations, each against the method that it changes. Trainings ran under different loads,
and their seconds cannot be compared: time is counted in AdamW's steps. A method's step counts as many of them as
`step_ratios` measured, and what its start took is divided by what AdamW's step would have taken in that same training.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.contenders import ABLATIONS
from benchmarks.grit_convergence import SETUP, best_rates, final_loss, read
from tasks.report.figures import log_scale

REFERENCE = "AdamW"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables, draw the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument(
        "--step-ratios", type=Path, help="from step_ratios; without, every step counts as one of AdamW's"
    )
    parser.add_argument("--picture", type=Path, help="of the first setup; the next ones' get numbers")
    arguments = parser.parse_args(argv)
    ratios: dict[str, float] | None = None
    if arguments.step_ratios:
        measured = json.loads(arguments.step_ratios.read_text(encoding="utf-8"))
        ratios = measured["ratios"]
        print(f"Ratios of step times: {measured['pairs']} pairs, {measured['what']}; {measured['machine']}\n")
    for number, (setup, results) in enumerate(by_setup(read(arguments.results)).items(), start=1):
        ablations = [training for training in results if training["method"] in ABLATIONS]
        results = [training for training in results if training["method"] not in ABLATIONS]
        best = best_rates(results)
        print(", ".join(f"{name} {value}" for name, value in zip(SETUP, setup, strict=True)), end="\n\n")
        print(tuning_table(results, best), end="\n\n")
        print(seed_table(results, ratios), end="\n\n")
        if ablations:
            print(ablation_table(ablations, results), end="\n\n")
        if arguments.picture:
            name = arguments.picture.name if number == 1 else f"{arguments.picture.stem}-{number}.png"
            draw(results, best, arguments.picture.with_name(name))


def by_setup(results: list[dict[str, Any]]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Trainings that can be compared, by what they agree in."""
    groups = defaultdict(list)
    for training in results:
        groups[tuple(training[name] for name in SETUP)].append(training)
    return groups


def tuning_table(results: list[dict[str, Any]], best: dict[str, float]) -> str:
    """Final validation loss by method and learning rate, seed 0; the best in bold."""
    tuned = {
        (training["method"], training["rate"]): final_loss(training) for training in results if training["seed"] == 0
    }
    rates = sorted({rate for _, rate in tuned})
    lines = [["method", *(f"{rate:g}" for rate in rates)], ["---"] * (len(rates) + 1)]
    for method in sorted(best, key=lambda name: tuned[name, best[name]]):
        cells = [f"{tuned[method, rate]:.4f}" if (method, rate) in tuned else "" for rate in rates]
        lines.append(
            [method, *(f"**{c}**" if rate == best[method] else c for c, rate in zip(cells, rates, strict=True))]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def seed_table(results: list[dict[str, Any]], ratios: dict[str, float] | None = None) -> str:
    """Means and standard errors over the seeds that had no part in the tuning, against AdamW at its best rate there.

    Args:
        results: of one setup.
        ratios: seconds of a step in units of AdamW's, by method; without them the steps count as equally long.
    """
    runs: dict[tuple[str, float], dict[int, dict[str, Any]]] = defaultdict(dict)
    for training in results:
        if training["seed"] != 0:
            runs[training["method"], training["rate"]][training["seed"]] = training
    ends = {key: statistics.fmean(map(final_loss, by_seed.values())) for key, by_seed in runs.items()}
    references = [key for key in runs if key[0] == REFERENCE]
    if not references:
        return "no trainings of AdamW with other seeds yet"
    reference = runs[min(references, key=lambda key: ends[key])]
    steps = sorted(next(iter(reference.values()))["validation"])
    time = "time: start + steps" + (" × step ratio, in AdamW's steps" if ratios else ", each counted as AdamW's")
    heads = ["method", "rate", *(f"loss at {step}" for step in steps), "less than AdamW's", "steps", time, "seeds"]
    lines = [heads, ["---"] * len(heads)]
    for (method, rate), by_seed in sorted(runs.items(), key=lambda item: ends[item[0]]):
        pairs = [(training, reference[seed]) for seed, training in by_seed.items() if seed in reference]
        losses = [mean([training["validation"].get(step, math.inf) for training, _ in pairs]) for step in steps]
        gain = mean([final_loss(other) - final_loss(training) for training, other in pairs])
        shares = _shares(pairs, ratios.get(method) if ratios else 1.0)
        lines.append([method, f"{rate:g}", *losses, gain, *shares, str(len(pairs))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ablation_table(ablations: list[dict[str, Any]], results: list[dict[str, Any]]) -> str:
    """Final loss with seed 0, and by how much it lies below that of the unchanged method: then, and with other seeds.

    Args:
        ablations: trainings of `ABLATIONS`.
        results: of the methods that they change, of the same setup.
    """
    unchanged = {(training["method"], training["rate"], training["seed"]): final_loss(training) for training in results}
    changed: dict[tuple[str, float], dict[int, dict[str, Any]]] = defaultdict(dict)
    for training in ablations:
        changed[training["method"], training["rate"]][training["seed"]] = training
    heads = ["change", "rate", "loss, seed 0", "less than without it", "with other seeds", "seeds", "mean rank"]
    lines = []
    for (name, rate), by_seed in changed.items():
        method = ABLATIONS[name].changes
        gains = {
            seed: unchanged[method, rate, seed] - final_loss(training)
            for seed, training in sorted(by_seed.items())
            if (method, rate, seed) in unchanged
        }
        others = [gain for seed, gain in gains.items() if seed != 0]
        rank = mean([training["rank"] for training in by_seed.values() if "rank" in training])
        first = f"{final_loss(by_seed[0]):.4f}" if 0 in by_seed else ""
        own = f"{gains[0]:.4f}" if 0 in gains else ""
        lines.append([name, f"{rate:g}", first, own, mean(others), str(len(others) or ""), rank])
    lines.sort(key=lambda line: line[2])
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, ["---"] * len(heads), *lines])


def _shares(pairs: list[tuple[dict[str, Any], dict[str, Any]]], ratio: float | None) -> tuple[str, str]:
    """Steps and time to the other's final validation loss, as shares of what the other took to get there first.

    Both are means over the trainings that got there; where not all did, their number is told.
    """
    steps, times = [], []
    for training, other in pairs:
        reached = steps_to(training, final_loss(other))
        if reached is None:
            continue
        first = steps_to(other, final_loss(other)) or other["steps"]
        steps.append(reached / first)
        if ratio is not None:
            times.append(time_to(training, reached, ratio) / first)
    if not steps:
        return (f"0 of {len(pairs)}",) * 2
    note = f" ({len(steps)} of {len(pairs)})" if len(steps) < len(pairs) else ""
    return mean(steps) + note, mean(times) + note if times else "not measured"


def steps_to(training: dict[str, Any], target: float) -> float | None:
    """Steps until the validation loss is that low, by linear interpolation between two validations."""
    before: tuple[int, float] | None = None
    for step, loss in sorted(training["validation"].items()):
        if loss <= target:
            if before is None:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - target) / (before[1] - loss)
        before = step, loss
    return None


def time_to(training: dict[str, Any], steps: float, ratio: float) -> float:
    """Time for that many steps and for the start, in steps of AdamW under the same load.

    Args:
        training: which.
        steps: how many.
        ratio: seconds of its step in units of AdamW's.
    """
    adamw_step = statistics.median(training["seconds"][1:]) / ratio
    return float(training["start_seconds"] / adamw_step + steps * ratio)


def mean(values: Sequence[float]) -> str:
    """The mean, with its standard error where there are two values at least."""
    if not all(map(math.isfinite, values)):
        return "diverged"
    if len(values) < 2:
        return f"{values[0]:.4f}" if values else ""
    return f"{statistics.fmean(values):.4f} ± {statistics.stdev(values) / len(values) ** 0.5:.4f}"


def draw(results: list[dict[str, Any]], best: dict[str, float], path: Path) -> None:
    """Left: loss by step, mean over the other seeds, at the best rate. Right: final loss by learning rate, seed 0."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    seeds = [training for training in results if training["seed"] != 0]
    colours = plt.get_cmap("tab20")
    for index, method in enumerate(sorted(best)):
        line, marker = ("--" if index % 2 else "-", "o") if index < 20 else (":", "s")  # there are 20 colours
        style: dict[str, Any] = {"color": colours(index % 20), "linestyle": line, "marker": marker, "label": method}
        by_rate = defaultdict(list)
        for training in seeds:
            if training["method"] == method:
                by_rate[training["rate"]].append(training)
        if by_rate:
            runs = min(by_rate.values(), key=lambda runs: statistics.fmean(map(final_loss, runs)))
            steps = sorted(runs[0]["validation"])
            curve = [
                statistics.fmean(training["validation"].get(step, math.inf) for training in runs) for step in steps
            ]
            left.plot(steps, curve, **style)
            left.set_xticks(steps)
        seed_0 = (training for training in results if training["method"] == method and training["seed"] == 0)
        tuned = sorted((training["rate"], final_loss(training)) for training in seed_0)
        right.semilogx(*zip(*tuned, strict=True), **style)
    left.set(xlabel="optimizer step", ylabel="validation loss (nats per supervised token)", title="at the best rate")
    right.set(xlabel="learning rate", ylabel="final validation loss", title="by learning rate, seed 0")
    for axes in (left, right):
        log_scale(axes)
    figure.legend(*right.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
