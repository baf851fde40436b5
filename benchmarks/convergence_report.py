"""Tables and pictures from the results of `grit_convergence`.

Run with `python -m benchmarks.convergence_report FILE.jsonl --picture OUT.png`. The first table is the tuning (seed 0,
every learning rate), the second the trainings with the other seeds at the best rate, against AdamW with the same seed.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.grit_convergence import best_rates, final_loss, read

REFERENCE = "AdamW"


def main() -> None:
    """Print the tables, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    results = read(arguments.results)
    best = best_rates(results)
    print(tuning_table(results, best))
    print()
    print(seed_table(results, best))
    if arguments.picture:
        draw(results, best, arguments.picture)


def tuning_table(results: list[dict[str, Any]], best: dict[str, float]) -> str:
    """Final validation loss by method and learning rate, seed 0; the best in bold."""
    tuned = {(one["method"], one["rate"]): final_loss(one) for one in results if one["seed"] == 0}
    rates = sorted({rate for _, rate in tuned})
    lines = [["method", *(f"{rate:g}" for rate in rates)], ["---"] * (len(rates) + 1)]
    for method in sorted(best, key=lambda name: tuned[name, best[name]]):
        cells = [f"{tuned[method, rate]:.4f}" if (method, rate) in tuned else "" for rate in rates]
        lines.append(
            [method, *(f"**{c}**" if rate == best[method] else c for c, rate in zip(cells, rates, strict=True))]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def seed_table(results: list[dict[str, Any]], best: dict[str, float]) -> str:
    """Means and standard errors over the seeds that had no part in the tuning."""
    runs: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for one in results:
        if one["seed"] != 0 and one["rate"] == best[one["method"]]:
            runs[one["method"]][one["seed"]] = one
    if REFERENCE not in runs:
        return "no trainings of AdamW with other seeds yet"
    steps = sorted(next(iter(runs[REFERENCE].values()))["validation"])
    heads = ["method", "rate", *(f"loss at {step}" for step in steps), "less than AdamW's", "steps", "time", "seeds"]
    lines = [heads, ["---"] * len(heads)]
    for method, by_seed in sorted(runs.items(), key=lambda item: statistics.fmean(map(final_loss, item[1].values()))):
        pairs = [(one, runs[REFERENCE][seed]) for seed, one in by_seed.items() if seed in runs[REFERENCE]]
        losses = [mean([one["validation"][step] for one, _ in pairs]) for step in steps]
        gain = mean([final_loss(other) - final_loss(one) for one, other in pairs])
        reached = [steps_to(one, final_loss(other)) for one, other in pairs]
        times = [
            time_to(one, step) / time_to(other, other["steps"])
            for (one, other), step in zip(pairs, reached, strict=True)
            if step is not None
        ]
        shares = [step / one["steps"] for (one, _), step in zip(pairs, reached, strict=True) if step is not None]
        whole = len(shares) == len(pairs)
        lines.append(
            [method, f"{best[method]:g}", *losses, gain, mean(shares) if whole else "not reached",
             mean(times) if whole else "not reached", str(len(pairs))]
        )  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def steps_to(one: dict[str, Any], target: float) -> float | None:
    """Steps until the validation loss is that low, by linear interpolation between two validations."""
    before: tuple[int, float] | None = None
    for step, loss in sorted(one["validation"].items()):
        if loss <= target:
            if before is None:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - target) / (before[1] - loss)
        before = step, loss
    return None


def time_to(one: dict[str, Any], steps: float) -> float:
    """Seconds for that many median steps, with what the start cost."""
    return float(one["start_seconds"] + steps * statistics.median(one["seconds"][1:]))


def mean(values: Sequence[float]) -> str:
    """The mean, with its standard error where there are two values at least."""
    if len(values) < 2:
        return f"{values[0]:.4f}" if values else ""
    return f"{statistics.fmean(values):.4f} ± {statistics.stdev(values) / len(values) ** 0.5:.4f}"


def draw(results: list[dict[str, Any]], best: dict[str, float], path: Path) -> None:
    """Left: validation loss by step at the best rate, mean over the seeds. Right: final loss by learning rate."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for index, method in enumerate(sorted(best)):
        style = {"color": f"C{index % 10}", "linestyle": "-" if index < 10 else "--", "marker": "o", "label": method}
        runs = [one for one in results if one["method"] == method and one["rate"] == best[method]]
        runs = [one for one in runs if one["seed"] != 0] or runs
        steps = sorted(runs[0]["validation"])
        curve = [
            statistics.fmean(one["validation"][step] for one in runs if step in one["validation"]) for step in steps
        ]
        left.semilogy(steps, curve, **style)
        tuned = sorted(
            (one["rate"], final_loss(one)) for one in results if one["method"] == method and one["seed"] == 0
        )
        right.loglog(*zip(*tuned, strict=True), **style)
    left.set(xlabel="optimizer step", ylabel="validation loss (nats per supervised token)", title="at the best rate")
    right.set(xlabel="learning rate", ylabel="final validation loss", title="by learning rate, seed 0")
    figure.legend(*right.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
