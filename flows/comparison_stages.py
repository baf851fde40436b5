"""The stages of the flow `compare`: those of `finetune`, for several methods and seeds, and one report of all.

    fetch_model ─┬─> prepare_dataset ─┬─> by seed and method: train ─> merge ─┬─> score ──────────────┐
    fetch_data ──┘                    │                                       ├─> convert ────────────┤
                                      │                                       ├─> answer_prompts ─────┤
                                      │                                       └─> measure_forgetting ─┤
                                      ├─> of the base: score, answer_prompts, measure_forgetting ─────┤
                                      └─> write_comparison <──────────────────────────────────────────┘

With a second data set, `measure_second_data` measures every model on that too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flows.finetune import Tuned, prepared, trained, tuned
from flows.support.cluster import Branch, run_on_cluster
from tasks.analysis.compared_runs import BaseFigures, ComparedRun, FaultRun, RateTrial
from tasks.analysis.methods import at_rate, fault_settings, settings_of, training_seeds, validated_by_tokens
from tasks.comparison.answer_prompts import answer_prompts
from tasks.comparison.judge_answers import judge_answers
from tasks.comparison.measure_forgetting import measure_forgetting, read_text
from tasks.comparison.measure_second_data import measure_second_data, second_settings
from tasks.comparison.reproduce_fault import reproduce_fault
from tasks.comparison.write_comparison import write_comparison
from tasks.engine.artifacts import Artifact, Store
from tasks.engine.errors import TemporaryError, TrainingError, UserError
from tasks.engine.logs import run_logger
from tasks.engine.planning import Pending
from tasks.fetch_data import fetch_data
from tasks.prepare_dataset import prepare_dataset
from tasks.runs.preflight import check_data, check_settings
from tasks.settings.comparison import FAULT, ComparedMethod, CompareSettings
from tasks.settings.finetune import FinetuneSettings, ScoringSettings


@dataclass(frozen=True)
class Measurement:
    """What every model is measured on, beside the stages' own figures."""

    dataset: Artifact
    second: Artifact | None
    second_rows: int
    text: str | None
    scoring: ScoringSettings
    answers: int


def stages(settings: FinetuneSettings, comparison: CompareSettings) -> Artifact:
    """Chain the stages; methods take turns within a seed, so that a machine that slows down slows all of them.

    With a cluster its workers go ahead with trials and trainings, and what follows here finds them cached.
    """
    store = Store(settings.store, settings.store_uri)
    methods, not_run = runnable(settings, comparison)
    first = methods[comparison.methods[0]]
    text = str(comparison.forgetting_text) if comparison.forgetting_text else None
    model, dataset, base_scores = prepared(first)
    if not isinstance(dataset, Pending):
        settings = validated_by_tokens(settings, dataset.facts)
        methods = {method: settings_of(method, settings) for method in methods}
        first = methods[comparison.methods[0]]
    second = _second_data(first, comparison, model)
    inputs = [model, dataset, *([second] if second else [])]
    measurement = Measurement(dataset, second, comparison.second_rows, text, settings.scoring, comparison.answers)
    base = _whole(BaseFigures, scores=base_scores, **_measured(model, settings, measurement))
    if not isinstance(base, Pending):
        _check_rows(comparison, dataset, base)

    at_rates = {(m, rate): at_rate(own, rate) for m, own in methods.items() for rate in comparison.learning_rates}
    tried = {
        (method, rate): Branch(f"{method} at {rate}", trained, (own, model, dataset, own.seed))
        for (method, rate), own in at_rates.items()
    }
    failures = run_on_cluster(comparison.cluster, tried, inputs, store)
    trials: list[Any] = []
    for method, own in list(methods.items()) if comparison.learning_rates else ():
        try:
            of_method = [_tried(method, rate, tried[method, rate], failures) for rate in comparison.learning_rates]
        except TemporaryError as error:  # it says nothing of the rate, and with fewer rates the budget were not equal
            if own is first:
                raise
            _leave_out(method, str(error), methods, not_run)
            continue
        methods[method] = at_rate(own, _best(of_method, comparison.learning_rates))
        trials += of_method
    first = methods[comparison.methods[0]]

    runs: list[Any] = []
    branches = {
        (method, seed): Branch(f"{method}, seed {seed}", branch, (own, model, measurement, seed))
        for seed in training_seeds(comparison, settings.seed)
        for method, own in methods.items()
    }
    failed = run_on_cluster(comparison.cluster, branches, inputs, store)
    for (method, seed), one in branches.items():
        if method not in methods:
            continue
        try:
            if (method, seed) in failed:
                raise failed[method, seed]
            made, figures = one.run()
        except (TrainingError, TemporaryError) as error:
            if methods[method] is first:
                raise
            _leave_out(method, f"seed {seed}: {error}", methods, not_run)
            runs = [run for run in runs if isinstance(run, Pending) or run.method != method]
        else:
            if methods[method] is first:
                reference = figures["answers"]
            elif comparison.judge_model and "judge" not in not_run:
                figures["judgement"] = _judged(reference, figures["answers"], comparison, store, not_run)
            parts = {name: getattr(made, name) for name in ("adapter", "history", "scores", "gguf")}
            runs.append(_whole(ComparedRun, method=method, seed=seed, **parts, **figures))
    faults = _faults(first, model, dataset, store, not_run) if FAULT in comparison.methods else []
    return write_comparison(
        settings, comparison, model, dataset, base, _all(trials), _all(runs), _all(faults), not_run, store=store
    )


def branch(
    settings: FinetuneSettings, model: Artifact, measurement: Measurement, seed: int
) -> tuple[Tuned, dict[str, Any]]:
    """All that is made and measured of one method with one seed."""
    made = tuned(settings, model, measurement.dataset, seed)
    return made, _measured(made.merged, settings, measurement)


def _leave_out(
    method: ComparedMethod, reason: str, methods: dict[ComparedMethod, FinetuneSettings], not_run: dict[str, str]
) -> None:
    not_run[method] = reason
    run_logger().warning("%s is left out: %s", method, reason)
    del methods[method]


def _faults(
    first: FinetuneSettings, model: Artifact, dataset: Artifact, store: Store, not_run: dict[str, str]
) -> list[Any]:
    """The study's fault, reproduced once: it is shown, not compared. Where that fails, the report says why."""
    try:
        grit = fault_settings(first.training)
        history = reproduce_fault(
            model, dataset, first.model, first.lora, first.training, grit, first.seed, store=store
        )
    except (TrainingError, TemporaryError) as failure:
        not_run[FAULT] = str(failure)
        run_logger().warning("%s is left out: %s", FAULT, failure)
        return []
    return [_whole(FaultRun, seed=first.seed, history=history)]


def runnable(
    settings: FinetuneSettings, comparison: CompareSettings
) -> tuple[dict[ComparedMethod, FinetuneSettings], dict[str, str]]:
    """Settings of the methods that can be trained here, and why others cannot.

    Raises:
        UserError: the first method cannot, or the text or the second data set is not there.
    """
    if comparison.forgetting_text:
        read_text(str(comparison.forgetting_text))
    if comparison.second_data:
        second = second_settings(settings.data, comparison.second_data)
        try:
            check_data(second)
        except UserError as error:
            fix = "This is `second_data`, whose columns cannot be mapped: name another file, or mend this one."
            raise UserError(error.what, where=error.where, fix=fix) from None
    methods: dict[ComparedMethod, FinetuneSettings] = {}
    not_run: dict[str, str] = {}
    for method in comparison.methods:
        if method == FAULT:
            continue
        own = settings_of(method, settings)
        try:
            check_settings(own)
        except UserError as error:
            if not methods:
                raise
            not_run[method] = str(error)
        else:
            twin = next((name for name, other in methods.items() if other == own), None)
            if twin:
                fix = "Leave one of them out."
                raise UserError(f"{method} and {twin} are the same with these settings", where="methods", fix=fix)
            methods[method] = own
    return methods, not_run


def _measured(network: Artifact, settings: FinetuneSettings, on: Measurement) -> dict[str, Any]:
    store, base = Store(settings.store, settings.store_uri), settings.model
    second = None
    if on.second:
        asked = (network, on.second, on.dataset, on.scoring, base, on.second_rows, settings.seed)
        second = measure_second_data(*asked, store=store)
    return {
        "second": second,
        "answers": answer_prompts(network, on.dataset, on.scoring, on.answers, base, store=store),
        "forgetting": measure_forgetting(network, on.dataset, on.scoring, on.text, base, store=store),
    }


def _check_rows(comparison: CompareSettings, dataset: Artifact, base: BaseFigures) -> None:
    """Refuse, before anything is trained, what needs held-out rows where there are none."""
    if comparison.learning_rates and not dataset.facts["rows"]["validation"]:
        fix = "Hold rows out: data.validation_fraction."
        raise UserError("there are no validation rows to choose a rate by", where="learning_rates", fix=fix)
    if comparison.judge_model and not base.answers.facts["answers"]:
        fix = "Ask for some with `answers` and hold rows out, or leave judge_model out."
        raise UserError("there are no answers to judge", where="judge_model", fix=fix)


def _judged(
    reference: Artifact, answers: Artifact, comparison: CompareSettings, store: Store, not_run: dict[str, str]
) -> Artifact | None:
    """What the judge says. Where it fails, the report is written without it and says so."""
    try:
        model = comparison.judge_model or ""
        return judge_answers(reference, answers, comparison.judge_url, model, store=store)
    except (UserError, TemporaryError) as error:
        not_run["judge"] = str(error)
        run_logger().warning("The judge is left out: %s", error)
        return None


def _second_data(settings: FinetuneSettings, comparison: CompareSettings, model: Artifact) -> Artifact | None:
    """The second data set in the first one's chat format, if there is one."""
    if comparison.second_data is None:
        return None
    store = Store(settings.store, settings.store_uri)
    data = second_settings(settings.data, comparison.second_data)
    source = fetch_data(data, settings.seed, store=store)
    return prepare_dataset(source, model, data, settings.chat, settings.seed, store=store)


def _tried(method: ComparedMethod, rate: float, one: Branch, failures: dict[Any, TrainingError]) -> Any:
    """A trial's history, or why there is none."""
    try:
        if (method, rate) in failures:
            raise failures[method, rate]
        return _whole(RateTrial, method=method, learning_rate=rate, history=one.run().history)
    except TrainingError as error:
        return RateTrial(method=method, learning_rate=rate, failure=str(error))


def _best(trials: list[Any], rates: tuple[float, ...]) -> float:
    """The rate of the lowest validation loss; in a plan whose trials are still to run, the first."""
    if any(isinstance(one, Pending) for one in trials):
        return rates[0]
    return float(min(trials, key=lambda one: one.loss).learning_rate)


def _whole(kind: Any, **values: Any) -> Any:
    """Values as a model, or pending if one of them is."""
    pending = any(isinstance(value, Pending) for value in values.values())
    return Pending(kind) if pending else kind(**values)


def _all(values: list[Any]) -> Any:
    return Pending() if any(isinstance(value, Pending) for value in values) else tuple(values)
