"""What the trainings of a comparison took, and the size of what came out."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tasks.analysis.compared_runs import ComparedRun
from tasks.analysis.metric import Better, Metric, Runs
from tasks.engine.artifacts import Artifact
from tasks.model.files import opened
from tasks.training.history import kept_loss, last_steps, steps_of

ENERGY = {"energy:processor": "energy_joules", "energy:gpu": "gpu_energy_joules"}
"""Key of a row, and the name in the history's facts."""


def cost_metrics(runs: Runs) -> list[Metric]:
    """Time to the reference's loss, time, memory, sizes, the GGUF's speed, and energy.

    Args:
        runs: by method; the first method is the reference.
    """
    return [
        *_to_reference(runs),
        *_times(runs),
        _peak_memory(runs),
        _cost("gradient_norm", None, runs, _last_gradient_norm),
        *_sizes(runs),
        *_gguf_speed(runs),
        *(_energy(key, fact, runs) for key, fact in ENERGY.items()),
    ]


def _cost(
    key: str, better: Better | None, runs: Runs, value: Callable[[ComparedRun], float], digits: int = 4
) -> Metric:
    """One value of each run."""
    values = {method: np.array([value(run) for run in of_method], dtype=float) for method, of_method in runs.items()}
    return Metric(key, "cost", better, values, digits=digits)


def point_reaching(run: ComparedRun, target: float) -> tuple[float, float] | None:
    """Step and seconds of training at which the validation loss came down to a value; none if it never did.

    Between two validations the loss is taken to fall in a straight line. Seconds count the optimizer steps and, with
    GRIT, the finding of its first basis; not the validations.

    Args:
        run: a training.
        target: the loss.
    """
    facts, before = run.history.facts, None
    for step, loss in facts["validation"]:
        if loss <= target:
            at = step if before is None else np.interp(-target, [-before[1], -loss], [before[0], step])
            seconds = np.cumsum([0.0, *(line["seconds"] for line in steps_of(run.history))])
            return float(at), facts["basis_seconds"] + float(np.interp(at, np.arange(len(seconds)), seconds))
        before = (step, loss)
    return None


def _to_reference(runs: Runs) -> list[Metric]:
    """Steps and seconds until a method is as good as the reference is at the end."""
    reference = next(iter(runs))
    targets = [kept_loss(run.history) for run in runs[reference] if run.history.facts["validation"]]
    if len(targets) < len(runs[reference]):
        return []
    metrics = [
        Metric(key, "cost", "lower", {}, digits=1, facts={"reference": reference})
        for key in ("steps_to_reference", "seconds_to_reference")
    ]
    for method, of_method in runs.items():
        points = [point_reaching(run, target) for run, target in zip(of_method, targets, strict=True)]
        reaching = [point for point in points if point is not None]
        for index, metric in enumerate(metrics):
            if len(reaching) == len(points):
                metric.values[method] = np.array([point[index] for point in reaching], dtype=float)
            else:
                metric.notes[method] = f"reached with {len(reaching)} of {len(points)} seeds"
    return metrics


def _times(runs: Runs) -> list[Metric]:
    def per_second(run: ComparedRun, fact: str) -> float:
        return float(run.history.facts[fact] / run.history.facts["total_seconds"])

    return [
        _cost(
            "median_seconds_per_step", "lower", runs, lambda run: run.history.facts["median_seconds_per_step"], digits=3
        ),
        _cost("total_seconds", "lower", runs, lambda run: run.history.facts["total_seconds"], digits=1),
        _cost("basis_seconds", None, runs, lambda run: run.history.facts["basis_seconds"], digits=1),
        _cost("tokens_per_second", "higher", runs, lambda run: per_second(run, "tokens"), digits=1),
        _cost(
            "supervised_tokens_per_second", "higher", runs, lambda run: per_second(run, "supervised_tokens"), digits=1
        ),
    ]


def _peak_memory(runs: Runs) -> Metric:
    kinds = dict.fromkeys(run.history.facts["peak_memory_kind"] for of_method in runs.values() for run in of_method)
    metric = _cost("peak_memory", "lower", runs, lambda run: run.history.facts["peak_memory_bytes"] * 1e-9, digits=2)
    metric.facts = {"kinds": " or ".join(kinds)}
    return metric


def _last_gradient_norm(run: ComparedRun) -> float:
    return float(np.mean([step["grad_norm"] for step in last_steps(steps_of(run.history))]))


def _sizes(runs: Runs) -> list[Metric]:
    return [
        _cost("trainable_parameters", None, runs, lambda run: run.history.facts["trainable_parameters"], digits=0),
        _cost("effective_parameters", None, runs, lambda run: adapter_weights(run.adapter), digits=0),
        _cost("gguf_size", None, runs, lambda run: run.gguf.size / 1e6, digits=2),
    ]


def adapter_weights(adapter: Artifact) -> int:
    """Number of weights in an adapter's file: without the directions of rank space that GRIT has cut.

    Args:
        adapter: of PEFT.
    """
    count = 0
    with opened(adapter.path / "adapter_model.safetensors", "np") as tensors:
        for name in tensors.keys():  # noqa: SIM118, no mapping
            count += math.prod(tensors.get_slice(name).get_shape())
    return count


def _gguf_speed(runs: Runs) -> list[Metric]:
    """None where some GGUF has answered nothing."""
    answers = [run.gguf.facts.get("answer", {}) for of_method in runs.values() for run in of_method]
    if any(answer.get("tokens_per_second") is None for answer in answers):
        return []
    speed = _cost(
        "gguf_tokens_per_second", None, runs, lambda run: run.gguf.facts["answer"]["tokens_per_second"], digits=1
    )
    return [speed]


def _energy(key: str, fact: str, runs: Runs) -> Metric:
    """Methods of which a training told no energy have a note in place of it."""
    joules = {method: [run.history.facts[fact] for run in of_method] for method, of_method in runs.items()}
    metered = {method: np.array(of_method) / 1e3 for method, of_method in joules.items() if None not in of_method}
    notes = {method: "not told" for method in runs if method not in metered}
    return Metric(key, "cost", "lower", metered, digits=1, notes=notes)
