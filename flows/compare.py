"""The flow `compare`: several methods, several seeds, one set of held-out rows, one report. Nothing is registered.

    fetch_model ─┬─> prepare_dataset ─┬─> by seed and method: train ─> merge ─┬─> score ──────────────┐
    fetch_data ──┘                    │                                       ├─> convert ────────────┤
                                      │                                       ├─> answer_prompts ─────┤
                                      │                                       └─> measure_forgetting ─┤
                                      ├─> of the base: score, answer_prompts, measure_forgetting ─────┤
                                      └─> write_comparison <──────────────────────────────────────────┘

With a second data set, `measure_second_data` measures every model on that too. The stages are those of `finetune`, with
the same arguments: what either has computed is cached for both, and a further seed or method runs only what is new. Run
`python -m flows.compare --help` for the command line.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.runtime import flow_run
from pydantic import ValidationError
from pydantic_settings import BaseSettings, CliSuppress, SettingsConfigDict
from rich.console import Console
from rich.table import Table

from flows.command_line import exit_status, leave, parse, stopping_at_once
from flows.finetune import prepared, tuned
from flows.publishing import show_user_errors_as_one_line
from tasks.answers import answer_prompts
from tasks.artifacts import Artifact, Store
from tasks.compared_runs import BaseFigures, ComparedRun, FaultRun, RateTrial
from tasks.comparison_report import write_comparison
from tasks.comparison_settings import FAULT, ComparedMethod, CompareSettings, at_rate, settings_of
from tasks.dataset import prepare_dataset
from tasks.errors import UserError
from tasks.estimate import check_disk, disk_needs, estimate
from tasks.finished import remember_comparison
from tasks.forgetting import measure_forgetting, read_text
from tasks.judge import check_judge, judge_answers
from tasks.logs import run_logger
from tasks.model import fetch_model
from tasks.planning import Pending, Plan, planning, recording
from tasks.preflight import check_settings
from tasks.presets import Overrides, given, load_settings, settings_error
from tasks.second_data import measure_second_data, second_settings
from tasks.settings import FinetuneSettings, Method
from tasks.source import check_files, fetch_data
from tasks.study_fault import reproduce_fault
from tasks.training import train


def _name() -> str:
    """The flow run's name; without what cannot be read where the settings are wrong, which the run itself will say."""
    comparison = flow_run.parameters["comparison"] or {}
    methods = comparison.get("methods") if isinstance(comparison, dict) else comparison.methods
    return f"{' '.join(methods or CompareSettings().methods)}, {flow_run.parameters['preset']}"


@flow(name="compare", flow_run_name=_name)
def compare(
    preset: str = "demo", comparison: CompareSettings | None = None, overrides: Overrides | None = None
) -> Artifact:
    """Train several methods with several seeds, measure all on the same held-out rows, and write one report.

    Args:
        preset: a name in `presets/`, or the path of a YAML file.
        comparison: methods, seeds, and what is measured beside the stages' own figures.
        overrides: single settings over the preset's, for all methods, nested like them.

    Returns:
        The artifact `comparison`.
    """
    show_user_errors_as_one_line()
    settings, wanted = load_settings(preset, given(overrides)), comparison or CompareSettings()
    shared = settings_of(wanted.methods[0], settings)
    plan = plan_of(settings, wanted)
    if disk_needs(shared, plan) is None:  # known once the model is there
        fetch_model(settings.model, store=Store(settings.store, settings.store_uri))
        plan = plan_of(settings, wanted)
    check_disk(shared, plan)
    if wanted.judge_model:
        check_judge(wanted.judge_url, wanted.judge_model)
    with recording() as done:
        report = stages(settings, wanted)
    store = Store(settings.store, settings.store_uri)
    remember_comparison(store, done, report, wanted.methods, settings.model.name)
    text = (report.path / "report.md").read_text(encoding="utf-8")
    create_markdown_artifact(text, key="comparison", description=f"Full report: {report.path / 'report.html'}")
    return report


def plan_of(settings: FinetuneSettings, comparison: CompareSettings) -> Plan:
    """What a comparison would do."""
    with planning() as plan:
        stages(settings, comparison)
    return plan


def stages(settings: FinetuneSettings, comparison: CompareSettings) -> Artifact:
    """Chain the stages; methods take turns within a seed, so that a machine that slows down slows all of them."""
    store, trust = Store(settings.store, settings.store_uri), settings.model.trust_remote_code
    methods, not_run = _runnable(settings, comparison)
    first = methods[comparison.methods[0]]
    text = str(comparison.forgetting_text) if comparison.forgetting_text else None
    read_text(text)
    model, dataset, base_scores = prepared(first)
    second = _second_data(first, comparison, model)

    def measured(network: Artifact) -> dict[str, Any]:
        scoring = settings.scoring
        return {
            "second": measure_second_data(network, second, scoring, trust, store=store) if second else None,
            "answers": answer_prompts(network, dataset, scoring, comparison.answers, trust, store=store),
            "forgetting": measure_forgetting(network, dataset, scoring, text, trust, store=store),
        }

    base = _whole(BaseFigures, scores=base_scores, **measured(model))
    trials: list[Any] = []
    for method, own in methods.items():
        methods[method], tried = _at_best_rate(method, own, comparison, model, dataset)
        trials += tried
    first = methods[comparison.methods[0]]
    runs: list[Any] = []
    faults: list[Any] = []
    if FAULT in comparison.methods:  # once: it is shown, not compared
        training = first.training
        history = reproduce_fault(model, dataset, first.model, first.lora, training, settings.seed, store=store)
        faults.append(_whole(FaultRun, seed=settings.seed, history=history))
    for seed in comparison.training_seeds(settings.seed):
        for method, own in list(methods.items()):
            try:
                made = tuned(own, model, dataset, seed)
                figures = measured(made.merged)
                if own is first:
                    reference = figures["answers"]
                elif comparison.judge_model:
                    asked = (comparison.judge_url, comparison.judge_model)
                    figures["judgement"] = judge_answers(reference, figures["answers"], *asked, store=store)
            except UserError as error:
                if own is first:
                    raise
                not_run[method] = f"seed {seed}: {error}"
                run_logger().warning("%s is left out: %s", method, not_run[method])
                del methods[method]
                runs = [run for run in runs if isinstance(run, Pending) or run.method != method]
            else:
                parts = {name: getattr(made, name) for name in ("adapter", "history", "scores", "gguf")}
                runs.append(_whole(ComparedRun, method=method, seed=seed, **parts, **figures))
    return write_comparison(
        settings, comparison, model, dataset, base, _all(trials), _all(runs), _all(faults), not_run, store=store
    )


def _second_data(settings: FinetuneSettings, comparison: CompareSettings, model: Artifact) -> Artifact | None:
    """The second data set in the first one's chat format, if there is one."""
    if comparison.second_data is None:
        return None
    store = Store(settings.store, settings.store_uri)
    data = second_settings(settings.data, comparison.second_data, comparison.second_rows)
    check_files(data)
    source = fetch_data(data, settings.seed, store=store)
    return prepare_dataset(source, model, data, settings.chat, settings.seed, store=store)


def _at_best_rate(
    method: str, settings: FinetuneSettings, comparison: CompareSettings, model: Artifact, dataset: Artifact
) -> tuple[FinetuneSettings, list[Any]]:
    """A method at its best learning rate, and the trials that tell; as it is where no rates are to be tried.

    In a plan whose trials are still to run, the first rate stands for the best.

    Raises:
        UserError: there are no validation rows to choose by.
    """
    grit, store = settings.grit if settings.method == "grit" else None, Store(settings.store, settings.store_uri)
    trials: list[Any] = []
    for rate in comparison.learning_rates:
        own = at_rate(settings, rate)
        try:
            trained = train(model, dataset, own.model, own.lora, own.training, grit, own.seed, store=store)
            trials.append(_whole(RateTrial, method=method, learning_rate=rate, history=trained.history))
        except UserError as error:  # it diverged
            trials.append(RateTrial(method=method, learning_rate=rate, failure=str(error)))
    if not trials:
        return settings, []
    if any(isinstance(trial, Pending) for trial in trials):
        return at_rate(settings, comparison.learning_rates[0]), trials
    if any(trial.history and not trial.history.facts["validation"] for trial in trials):
        fix = "Hold rows out: data.validation_fraction."
        raise UserError("there are no validation rows to choose a rate by", where="learning_rates", fix=fix)
    return at_rate(settings, min(trials, key=lambda trial: trial.loss).learning_rate), trials


def _runnable(
    settings: FinetuneSettings, comparison: CompareSettings
) -> tuple[dict[ComparedMethod, FinetuneSettings], dict[str, str]]:
    """Settings of the methods that can be trained here, and why others cannot.

    Raises:
        UserError: the first method cannot.
    """
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
            methods[method] = own
    return methods, not_run


def _whole(kind: Any, **values: Any) -> Any:
    """Values as a model, or pending if one of them is."""
    pending = any(isinstance(value, Pending) for value in values.values())
    return Pending() if pending else kind(**values)


def _all(values: list[Any]) -> Any:
    return Pending() if any(isinstance(value, Pending) for value in values) else tuple(values)


class CompareLine(BaseSettings, CompareSettings, FinetuneSettings):
    """Compare methods of fine-tuning. Options that a preset holds replace its values, for all methods."""

    model_config = SettingsConfigDict(
        cli_prog_name="python -m flows.compare",
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_parse_none_str="null",
    )

    preset: str = "demo"
    """A name in presets/, or the path of a YAML file."""
    plan: bool = False
    """Print what is cached, and the estimated disk and time; run nothing."""
    method: CliSuppress[Method] = "baseline"


def parse_comparison(arguments: Sequence[str]) -> tuple[str, bool, CompareSettings, dict[str, Any]]:
    """Read the command line.

    Args:
        arguments: without the program's name.

    Returns:
        The preset, whether only to plan, what is compared, and the other settings given, nested.

    Raises:
        UserError: an option that does not exist, or a value that is impossible.
    """
    preset, plan, values = parse(arguments, CompareLine)
    if "method" in values:
        raise UserError("a comparison has several methods", where="--method", fix="Use --methods baseline,grit.")
    own = {name: values.pop(name) for name in CompareSettings.model_fields if name in values}
    try:
        return preset, plan, CompareSettings.model_validate(own), values
    except ValidationError as error:
        raise settings_error(error, "command line") from None


def show_plan(settings: FinetuneSettings, comparison: CompareSettings) -> None:
    """Print the methods, how many stages are cached, and the estimates."""
    console, plan = Console(), plan_of(settings, comparison)
    methods, not_run = _runnable(settings, comparison)
    seeds = comparison.training_seeds(settings.seed)
    console.print(f"{', '.join(methods)}; seeds {', '.join(map(str, seeds))}")
    for method, reason in not_run.items():
        console.print(f"not run: {method}: {reason}")
    counts = Counter(plan.stages)
    table = Table("stage", "cached", "to run", title=f"comparison on {settings.model.name}")
    for name in dict.fromkeys(name for name, _ in plan.stages):
        table.add_row(name, str(counts[name, "cached"]), str(counts[name, "to run"]))
    console.print(table)
    for line in estimate(settings_of(comparison.methods[0], settings), plan):
        console.print(line)


def run(arguments: Sequence[str] | None = None) -> int:
    """Compare from the command line and return the exit status, as `flows.command_line.run` does."""

    def act() -> None:
        preset, plan, comparison, values = parse_comparison(sys.argv[1:] if arguments is None else arguments)
        settings = load_settings(preset, values)
        if plan:
            show_plan(settings, comparison)
            return
        with stopping_at_once():
            started: Callable[..., Artifact] = compare  # Prefect makes typed overrides of the nested values
            report = started(preset, comparison, values)
        print(f"\n{report.facts['verdict']}\n\nReport: {report.path / 'report.html'}")
        print(f"TensorBoard: tensorboard --logdir {report.path / 'tensorboard'}")

    return exit_status(act)


if __name__ == "__main__":
    leave(run())
