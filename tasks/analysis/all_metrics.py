"""Every figure of a comparison, out of the outputs of the runs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tasks.analysis.compared_runs import BaseFigures, ComparedRun
from tasks.analysis.lm_eval_measures import lm_eval_measures
from tasks.analysis.measure import Measure, Runs, answer_measures
from tasks.engine.artifacts import Artifact
from tasks.evaluation.quality import LOWER_IS_BETTER, MEASURES, matrix
from tasks.model.files import opened
from tasks.training.history import LAST, final_training_loss, kept_loss, last_steps, steps_of, steps_to_kept


def reached(run: ComparedRun, target: float) -> tuple[float, float] | None:
    """Step and seconds of training at which the validation loss came down to a value; none if it never did.

    Between two validations the loss is taken to fall in a straight line. Seconds count the optimizer steps and, with
    GRIT, the finding of its first basis; not the validations.
    """
    facts, before = run.history.facts, None
    for step, loss in facts["validation"]:
        if loss <= target:
            at = step if before is None else np.interp(-target, [-before[1], -loss], [before[0], step])
            seconds = np.cumsum([0.0, *(line["seconds"] for line in steps_of(run.history))])
            return float(at), facts["basis_seconds"] + float(np.interp(at, np.arange(len(seconds)), seconds))
        before = (step, loss)
    return None


def measures(runs: Runs, base: BaseFigures) -> list[Measure]:
    """Every measure of the table that these runs have.

    Args:
        runs: all methods with the same seeds; the first method is the reference.
        base: of the base model.
    """
    found = [
        *_losses(runs, base),
        *lm_eval_measures(runs, base.scores),
        *_quality(runs, base),
        *_forgetting(runs, base),
        *_second(runs, base),
    ]
    return [*found, *_reaching(runs), *_costs(runs)]


def _losses(runs: Runs, base: BaseFigures) -> list[Measure]:
    training = {m: np.array([final_training_loss(steps_to_kept(run.history)) for run in r]) for m, r in runs.items()}
    found = [Measure("final training loss, nats per supervised token", "lower", training)]
    before = _rows(base.scores)["validation"]
    if before:
        counts = np.array(before["supervised_tokens"])
        values = {
            method: np.array([_rows(run.scores)["validation"]["nll"] for run in each]) for method, each in runs.items()
        }
        name = f"validation loss, nats per supervised token ({len(counts)} rows)"
        found.append(Measure(name, "lower", values, 4, counts, np.array([before["nll"]])))
        name = "perplexity of those rows (differences as ratios)"
        found.append(Measure(name, None, values, 4, counts, np.array([before["nll"]]), exponential=True))
        gap = {method: each.sum(axis=1) / counts.sum() - training[method] for method, each in values.items()}
        found.append(Measure("generalisation gap: validation less training loss", None, gap))
        trained = {method: np.array([kept_loss(run.history) for run in each]) for method, each in runs.items()}
        cost = {method: each.sum(axis=1) / counts.sum() - trained[method] for method, each in values.items()}
        found.append(Measure("loss added by merging and rounding", None, cost))
        lowest = {
            method: np.array([min(run.history.facts["validation"], key=lambda point: point[1])[0] for run in each])
            for method, each in runs.items()
        }
        found.append(Measure("step of the lowest validation loss", None, lowest, 1))
    return _grouped(found, "loss")


def _quality(runs: Runs, base: BaseFigures) -> list[Measure]:
    found = []
    before = [answer_measures(base.answers)]
    if not before[0]:
        return []
    for name, meaning in MEASURES.items():
        of_base = matrix(before, name)
        if of_base is not None:
            values = {m: matrix([answer_measures(run.answers) for run in r], name) for m, r in runs.items()}
            known = {method: each for method, each in values.items() if each is not None}
            better: Any = "lower" if name in LOWER_IS_BETTER else "higher"
            counts = np.ones(of_base.shape[1])
            found.append(Measure(f"{meaning} ({of_base.shape[1]} answers)", better, known, 4, counts, of_base))
    return _grouped(found, "answers")


def _forgetting(runs: Runs, base: BaseFigures) -> list[Measure]:
    values = {method: [run.forgetting for run in each] for method, each in runs.items()}
    found = _loss_elsewhere("loss on a text outside the data, nats per token ({} paragraphs)", base.forgetting, values)
    return _grouped([found], "forgetting")


def _second(runs: Runs, base: BaseFigures) -> list[Measure]:
    values = {method: [run.second for run in each if run.second] for method, each in runs.items()}
    if base.second is None:
        return []
    found = _loss_elsewhere("loss on the second data set, nats per supervised token ({} rows)", base.second, values)
    return _grouped([found], "second")


def _loss_elsewhere(name: str, base: Artifact, runs: Mapping[str, Sequence[Artifact]]) -> Measure:
    """Losses out of `rows.json` of each artifact."""
    before = _json(base.path / "rows.json")
    counts = np.array(before["supervised_tokens"])
    values = {m: np.array([_json(one.path / "rows.json")["nll"] for one in each]) for m, each in runs.items()}
    return Measure(name.format(len(counts)), "lower", values, 4, counts, np.array([before["nll"]]))


def _reaching(runs: Runs) -> list[Measure]:
    reference = next(iter(runs))
    targets = [kept_loss(run.history) for run in runs[reference] if run.history.facts["validation"]]
    if len(targets) < len(runs[reference]):
        return []
    found = [
        Measure(f"{what} to reach {reference}'s final validation loss", "lower", {}, 1) for what in ("steps", "seconds")
    ]
    for method, each in runs.items():
        points = [reached(run, target) for run, target in zip(each, targets, strict=True)]
        did = [point for point in points if point is not None]
        for index, one in enumerate(found):
            if len(did) == len(points):
                one.values[method] = np.array([point[index] for point in did], dtype=float)
            else:
                one.notes[method] = f"reached with {len(did)} of {len(points)} seeds"
    return _grouped(found, "cost")


def _costs(runs: Runs) -> list[Measure]:
    def facts(name: str, scale: float = 1.0) -> dict[str, np.ndarray]:
        return {m: np.array([run.history.facts[name] * scale for run in r], dtype=float) for m, r in runs.items()}

    def rate(name: str) -> dict[str, np.ndarray]:
        return {
            m: np.array([run.history.facts[name] / run.history.facts["total_seconds"] for run in r])
            for m, r in runs.items()
        }

    norms = {
        m: np.array([np.mean([step["grad_norm"] for step in last_steps(steps_of(run.history))]) for run in r])
        for m, r in runs.items()
    }
    kinds = dict.fromkeys(run.history.facts["peak_memory_kind"] for each in runs.values() for run in each)
    effective = {m: np.array([float(adapter_weights(run.adapter)) for run in r]) for m, r in runs.items()}
    size = {m: np.array([run.gguf.size / 1e6 for run in r]) for m, r in runs.items()}
    found = [
        Measure("median seconds of a step", "lower", facts("median_seconds_per_step"), 3),
        Measure("seconds of all steps", "lower", facts("total_seconds"), 1),
        Measure("seconds of finding the first basis", None, facts("basis_seconds"), 1),
        Measure("tokens per second", "higher", rate("tokens"), 1),
        Measure("supervised tokens per second", "higher", rate("supervised_tokens"), 1),
        Measure(f"peak memory, GB ({' or '.join(kinds)})", "lower", facts("peak_memory_bytes", 1e-9), 2),
        Measure(f"gradient norm before clipping, mean of the last steps ({LAST} at most)", None, norms),
        Measure("trainable parameters", None, facts("trainable_parameters"), 0),
        Measure("effective parameters (weights of the saved adapter)", None, effective, 0),
        Measure("GGUF, MB", None, size, 2),
    ]
    speed = {m: [run.gguf.facts.get("answer", {}).get("tokens_per_second") for run in r] for m, r in runs.items()}
    if all(value is not None for each in speed.values() for value in each):
        found.append(
            Measure(
                "GGUF, tokens per second of one answer in llama.cpp",
                None,
                {m: np.array(v) for m, v in speed.items()},
                1,
            )
        )
    for what, name in (("processor", "energy_joules"), ("GPU", "gpu_energy_joules")):
        energy = {m: [run.history.facts[name] for run in r] for m, r in runs.items()}
        told = {m: np.array(each) / 1e3 for m, each in energy.items() if None not in each}
        untold = {m: "not told" for m in runs if m not in told}
        found.append(Measure(f"energy of the {what} while training, kJ", "lower", told, 1, notes=untold))
    return _grouped(found, "cost")


def adapter_weights(adapter: Artifact) -> int:
    """Number of weights in an adapter's file: without the directions of rank space that GRIT has cut."""
    count = 0
    with opened(adapter.path / "adapter_model.safetensors", "np") as tensors:
        for name in tensors.keys():  # noqa: SIM118, no mapping
            count += math.prod(tensors.get_slice(name).get_shape())
    return count


def _grouped(found: list[Measure], group: str) -> list[Measure]:
    for one in found:
        one.group = group
    return found


def _rows(scores: Artifact) -> Any:
    return _json(scores.path / "rows.json")


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
