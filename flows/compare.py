"""The flow `compare`: several methods, several seeds, one set of held-out rows, one report. Nothing is registered.

The stages are those of `finetune`, with the same arguments: what either has computed is cached for both, and a further
seed or method runs only what is new. Run `llama3-grit compare --help` for the command line.
"""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from prefect import flow
from prefect.runtime import flow_run
from pydantic import ValidationError
from pydantic_settings import BaseSettings, CliSuppress, SettingsConfigDict
from rich.console import Console
from rich.table import Table

from flows.comparison_stages import stages
from flows.support.command_line import exit_status, parse, stopping_at_once
from flows.support.comparable import runnable
from flows.support.database import check_database_of_temporary_server
from flows.support.leaving import leave
from flows.support.pasting import as_typed, beside_python
from flows.support.publishing import in_one_line, show_report, show_user_errors_as_one_line
from flows.support.terminal import terminal_for
from tasks.analysis.methods import settings_of, training_seeds, validated_by_tokens
from tasks.engine.artifacts import Artifact, Store
from tasks.engine.errors import UserError
from tasks.engine.planning import Plan, planning, recording
from tasks.evaluation.judge import check_judge
from tasks.fetch_model import fetch_model
from tasks.runs.base_model import check_base_model
from tasks.runs.disk import check_disk, disk_needs
from tasks.runs.estimate import estimate
from tasks.runs.finished import remember_comparison
from tasks.settings.comparison import CompareSettings
from tasks.settings.finetune import FinetuneSettings, Method
from tasks.settings.presets import Overrides, given, load_settings, settings_error


def _name() -> str:
    """The flow run's name; without what cannot be read where the settings are wrong, which the run itself will say."""
    comparison = flow_run.parameters["comparison"] or {}
    methods = comparison.get("methods") if isinstance(comparison, dict) else comparison.methods
    return f"{' '.join(methods or CompareSettings().methods)}, {flow_run.parameters['preset']}"


@flow(name="compare", flow_run_name=_name)
def compare(
    preset: str = "demo",
    comparison: Annotated[CompareSettings | None, in_one_line("comparison")] = None,
    overrides: Annotated[Overrides | None, in_one_line("overrides")] = None,
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
    computes_here = wanted.cluster is None
    check_base_model(settings.model, plan, computes_here=computes_here)
    if disk_needs(shared, plan) is None:  # known once the model is there
        fetch_model(settings.model, store=Store(settings.store, settings.store_uri))
        plan = plan_of(settings, wanted)
        check_base_model(settings.model, plan, computes_here=computes_here)
    check_disk(shared, plan)
    if wanted.judge_model:
        check_judge(wanted.judge_url, wanted.judge_model)
    with recording() as done:
        report = stages(settings, wanted)
    store = Store(settings.store, settings.store_uri)
    remember_comparison(store, done, report, wanted.methods, settings.model.name)
    show_report(report, "comparison")
    return report


def plan_of(settings: FinetuneSettings, comparison: CompareSettings) -> Plan:
    """What a comparison would do."""
    with planning() as plan:
        stages(settings, comparison)
    return plan


LONG_LABEL = "measure_forgetting (tuned) baseline, seed 3407"


class CompareLine(BaseSettings, CompareSettings, FinetuneSettings):
    """Compare methods of fine-tuning. Options that a preset holds replace its values, for all methods."""

    model_config = SettingsConfigDict(
        cli_prog_name="llama3-grit compare",
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
    methods, not_run = runnable(settings, comparison)
    seeds = training_seeds(comparison, settings.seed)
    console.print(f"{', '.join(methods)}; seeds {', '.join(map(str, seeds))}")
    for method, reason in not_run.items():
        console.print(f"not run: {method}: {reason}")
    counts = Counter(plan.stages)
    table = Table("stage", "cached", "to run", title=f"comparison on {settings.model.name}")
    for name in dict.fromkeys(name for name, _ in plan.stages):
        table.add_row(name, str(counts[name, "cached"]), str(counts[name, "to run"]))
    console.print(table)
    check_base_model(settings.model, plan, computes_here=comparison.cluster is None)
    if dataset := plan.result_of("prepare_dataset"):
        settings = validated_by_tokens(settings, dataset.facts)
    for line in estimate(settings_of(comparison.methods[0], settings), plan):
        console.print(line)


def run(arguments: Sequence[str] | None = None) -> int:
    """Compare from the command line and return the exit status, as `flows.support.command_line.run` does."""

    def act() -> None:
        preset, plan, comparison, values = parse_comparison(sys.argv[1:] if arguments is None else arguments)
        settings = load_settings(preset, values)
        if plan:
            show_plan(settings, comparison)
            return
        runnable(settings, comparison)  # before a server is started for the flow, which takes many seconds
        check_database_of_temporary_server()
        print(
            f"Preset {preset}: {len(comparison.methods)} methods on {settings.model.name}. Ctrl-C is safe at any time."
        )
        with terminal_for("compare", Store(settings.store), widest=LONG_LABEL) as log, stopping_at_once():
            started: Callable[..., Artifact] = compare  # Prefect makes typed overrides of the nested values
            report = started(preset, comparison, values)
        tensorboard = [as_typed(beside_python("tensorboard")), "--logdir", str(report.path / "tensorboard")]
        print(f"\nTensorBoard:\n  {shlex.join(tensorboard)}")
        print(f"\n{report.facts['verdict']}\n")
        print(f"Log:    {log}")
        print(f"Report: {report.path / 'report.html'}")

    return exit_status(act)


if __name__ == "__main__":
    leave(run())
