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
from flows.support.comparable import check_held_out, runnable
from tasks.analysis.compared_runs import BaseFigures, ComparedRun, FaultRun, RateTrial
from tasks.analysis.methods import at_rate, fault_settings, settings_of, training_seeds, validated_by_tokens
from tasks.comparison.answer_prompts import answer_prompts
from tasks.comparison.judge_answers import judge_answers
from tasks.comparison.measure_forgetting import measure_forgetting
from tasks.comparison.measure_second_data import measure_second_data, second_settings
from tasks.comparison.reproduce_fault import reproduce_fault
from tasks.comparison.write_comparison import write_comparison
from tasks.engine.artifacts import Artifact, Store
from tasks.engine.errors import TemporaryError, TrainingError, UserError
from tasks.engine.logs import run_logger
from tasks.engine.planning import Pending
from tasks.fetch_data import fetch_data
from tasks.prepare_dataset import prepare_dataset
from tasks.settings.comparison import FAULT, ComparedMethod, CompareSettings
from tasks.settings.finetune import FinetuneSettings, ScoringSettings


@dataclass(frozen=True)
class EvaluationInputs:
    """What every model is evaluated on, beside the stages' own figures."""

    dataset: Artifact
    second_dataset: Artifact | None
    second_rows: int
    text: str | None
    scoring: ScoringSettings
    answers: int


def stages(settings: FinetuneSettings, comparison: CompareSettings) -> Artifact:
    """Chain the stages; methods take turns within a seed, so that a machine that slows down slows all of them.

    With a cluster its workers go ahead with trials and trainings, and what follows here finds them cached.
    """
    return _Comparison(settings, comparison).report()


class _Comparison:
    """A comparison on its way through its stages: which methods are still in, and what they start from."""

    def __init__(self, settings: FinetuneSettings, comparison: CompareSettings) -> None:
        self.comparison, self.store = comparison, Store(settings.store, settings.store_uri)
        self.first: ComparedMethod = comparison.methods[0]
        """What the others are measured against; without it there is no comparison."""
        self.methods, self.not_run = runnable(settings, comparison)
        """The settings of each method that is still in, and why others are not."""
        self.model, self.dataset, self.base_scores = prepared(self.methods[self.first])
        if not isinstance(self.dataset, Pending):
            settings = validated_by_tokens(settings, self.dataset.facts)
            self.methods = {method: settings_of(method, settings) for method in self.methods}
        self.settings = settings
        second = _second_data(self.methods[self.first], comparison, self.model)
        text = str(comparison.forgetting_text) if comparison.forgetting_text else None
        self.inputs = EvaluationInputs(
            self.dataset, second, comparison.second_rows, text, settings.scoring, comparison.answers
        )

    def report(self) -> Artifact:
        """Run all stages, in this order."""
        base = self._base_figures()
        trials = self._trials() if self.comparison.learning_rates else []
        runs = self._runs()
        faults = self._faults() if FAULT in self.comparison.methods else []
        return write_comparison(
            self.settings,
            comparison=self.comparison,
            model=self.model,
            dataset=self.dataset,
            base=base,
            trials=_all(trials),
            runs=_all(runs),
            faults=_all(faults),
            not_run=self.not_run,
            store=self.store,
        )

    def _base_figures(self) -> Any:
        """Of the base model; what needs held-out rows is refused here, before anything is trained."""
        base = _whole(BaseFigures, scores=self.base_scores, **evaluated(self.model, self.settings, self.inputs))
        if not isinstance(base, Pending):
            check_held_out(self.comparison, self.dataset, base)
        return base

    def _trials(self) -> list[Any]:
        """Train each method with each learning rate; the best one becomes its own."""
        rates = self.comparison.learning_rates
        branches = {
            (method, rate): Branch(
                f"{method} at {rate}", trained, (at_rate(own, rate), self.model, self.dataset, own.seed)
            )
            for method, own in self.methods.items()
            for rate in rates
        }
        failures = self._on_cluster(branches)
        trials: list[Any] = []
        for method, own in list(self.methods.items()):
            try:
                of_method = [_trial(method, rate, branches[method, rate], failures) for rate in rates]
            except TemporaryError as error:  # it says nothing of the rate; with fewer rates the budget were not equal
                self._leave_out(method, error, str(error))
            else:
                self.methods[method] = at_rate(own, _best_rate(of_method, rates))
                trials += of_method
        return trials

    def _runs(self) -> list[Any]:
        """Train and evaluate each method with each seed; of a method that fails with one, no run is kept."""
        branches = {
            (method, seed): Branch(f"{method}, seed {seed}", branch, (own, self.model, self.inputs, seed))
            for seed in training_seeds(self.comparison, self.settings.seed)
            for method, own in self.methods.items()
        }
        failures = self._on_cluster(branches)
        runs: list[tuple[ComparedMethod, Any]] = []
        first_answers: Artifact | None = None
        for (method, seed), of_seed in branches.items():
            if method not in self.methods:
                continue
            try:
                if (method, seed) in failures:
                    raise failures[method, seed]
                outputs, figures = of_seed.run()
            except (TrainingError, TemporaryError) as error:
                self._leave_out(method, error, f"seed {seed}: {error}")
                continue
            judgement = None
            if method == self.first:
                first_answers = figures["answers"]
            else:
                judgement = self._judgement(first_answers, figures["answers"])
            parts = {name: getattr(outputs, name) for name in ("adapter", "history", "scores", "gguf")}
            run = _whole(ComparedRun, method=method, seed=seed, judgement=judgement, **parts, **figures)
            runs.append((method, run))
        return [run for method, run in runs if method in self.methods]

    def _judgement(self, first_answers: Artifact | None, answers: Artifact) -> Artifact | None:
        """What the judge says, if one was asked for. Where it fails, the report is written without it and says so."""
        judge, url = self.comparison.judge_model, self.comparison.judge_url
        if judge is None or first_answers is None or "judge" in self.not_run:
            return None
        try:
            return judge_answers(first_answers, answers=answers, url=url, model=judge, store=self.store)
        except (UserError, TemporaryError) as error:
            self.not_run["judge"] = str(error)
            run_logger().warning("The judge is left out: %s", error)
            return None

    def _faults(self) -> list[Any]:
        """The study's fault, reproduced once: it is shown, not compared. Where that fails, the report says why."""
        first = self.methods[self.first]
        try:
            history = reproduce_fault(
                self.model,
                self.dataset,
                base=first.model,
                lora=first.lora,
                training=first.training,
                grit=fault_settings(first.training),
                seed=first.seed,
                store=self.store,
            )
        except (TrainingError, TemporaryError) as failure:
            self.not_run[FAULT] = str(failure)
            run_logger().warning("%s is left out: %s", FAULT, failure)
            return []
        return [_whole(FaultRun, seed=first.seed, history=history)]

    def _on_cluster(self, branches: dict[Any, Branch]) -> dict[Any, TrainingError]:
        second = self.inputs.second_dataset
        artifacts = [self.model, self.dataset, *([second] if second else [])]
        return run_on_cluster(self.comparison.cluster, branches, artifacts, self.store)

    def _leave_out(self, method: ComparedMethod, error: Exception, reason: str) -> None:
        """Go on without a method.

        Raises:
            Exception: the error itself, where it is the first method's.
        """
        if method == self.first:
            raise error
        self.not_run[method] = reason
        run_logger().warning("%s is left out: %s", method, reason)
        del self.methods[method]


def branch(
    settings: FinetuneSettings, model: Artifact, inputs: EvaluationInputs, seed: int
) -> tuple[Tuned, dict[str, Any]]:
    """Train one method with one seed, export the model, and evaluate it."""
    outputs = tuned(settings, model, inputs.dataset, seed)
    return outputs, evaluated(outputs.merged, settings, inputs)


def evaluated(model: Artifact, settings: FinetuneSettings, inputs: EvaluationInputs) -> dict[str, Any]:
    """Evaluate a model beside its scores: answers, forgetting, and the second data set if there is one."""
    store = Store(settings.store, settings.store_uri)
    shared: dict[str, Any] = {"settings": inputs.scoring, "base": settings.model, "store": store}
    dataset, second = inputs.dataset, None
    if (data := inputs.second_dataset) is not None:
        rows, seed = inputs.second_rows, settings.seed
        second = measure_second_data(model, second=data, trained=dataset, number=rows, seed=seed, **shared)
    return {
        "second": second,
        "answers": answer_prompts(model, dataset, number=inputs.answers, **shared),
        "forgetting": measure_forgetting(model, dataset, text=inputs.text, **shared),
    }


def _second_data(settings: FinetuneSettings, comparison: CompareSettings, model: Artifact) -> Artifact | None:
    """The second data set in the first one's chat format, if there is one."""
    if comparison.second_data is None:
        return None
    store = Store(settings.store, settings.store_uri)
    data = second_settings(settings.data, comparison.second_data)
    source = fetch_data(data, settings.seed, store=store)
    return prepare_dataset(source, model, data, settings.chat, settings.seed, store=store)


def _trial(method: ComparedMethod, rate: float, training: Branch, failures: dict[Any, TrainingError]) -> Any:
    """A trial's history, or why there is none."""
    try:
        if (method, rate) in failures:
            raise failures[method, rate]
        return _whole(RateTrial, method=method, learning_rate=rate, history=training.run().history)
    except TrainingError as error:
        return RateTrial(method=method, learning_rate=rate, failure=str(error))


def _best_rate(trials: list[Any], rates: tuple[float, ...]) -> float:
    """The rate of the lowest validation loss; in a plan whose trials are still to run, the first."""
    if any(isinstance(trial, Pending) for trial in trials):
        return rates[0]
    return float(min(trials, key=lambda trial: trial.loss).learning_rate)


def _whole(kind: Any, **values: Any) -> Any:
    """Values as a model, or pending if one of them is."""
    pending = any(isinstance(value, Pending) for value in values.values())
    return Pending(kind) if pending else kind(**values)


def _all(values: list[Any]) -> Any:
    return Pending() if any(isinstance(value, Pending) for value in values) else tuple(values)
