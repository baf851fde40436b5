"""What a flow shows in Prefect's log and pages, also of parameters that it does not take."""

from __future__ import annotations

import logging
import re
from typing import Any

import httpx
from prefect import State
from prefect.artifacts import create_markdown_artifact
from prefect.runtime import flow_run
from prefect.states import Completed
from pydantic import BaseModel, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from tasks.engine.artifacts import Artifact
from tasks.engine.display import announce
from tasks.engine.errors import TemporaryError, UserError
from tasks.engine.logs import run_logger
from tasks.runs.finished import FinishedRun
from tasks.settings.presets import given, load_settings, settings_error


def published(report: Artifact, result: BaseModel, outcome: str = "") -> State[Any]:
    """Put the short report on the flow run's page, and return the state in which the run ends.

    Args:
        report: the run's.
        result: what the flow returns.
        outcome: a sentence said before where the report is.
    """
    where = show_report(report, "report")
    return Completed(message=f"{outcome} {where}".strip(), data=result)  # notifications show a state's message


def show_report(report: Artifact, key: str) -> str:
    """Put a short report on the flow run's page, and return where the full one is.

    A server that does not answer costs the page, not the run.

    Args:
        report: with `report.md` and `report.html`.
        key: of Prefect's artifact.
    """
    text = (report.path / "report.md").read_text(encoding="utf-8")
    where = f"Full report: {report.path / 'report.html'}"
    try:
        create_markdown_artifact(text, key=key, description=where)
    except httpx.HTTPError as error:
        run_logger().warning("The run's page cannot show the report: %s. %s", error, where)
    return where


def method_and_model() -> str:
    """The flow run's name; without the model where the settings are wrong, which the run itself will say."""
    parameters = flow_run.parameters
    try:
        model = load_settings(parameters["preset"], given(parameters["overrides"])).model.name
    except UserError:
        model = parameters["preset"]
    return f"{parameters['method']} {model.rstrip('/').rpartition('/')[2]}"


def skipped(name: str, former: FinishedRun) -> State[Any]:
    """Log why there is nothing to do, and return the state in which such a run ends."""
    reason = f"Nothing has changed since {former.at:%Y-%m-%d %H:%M} UTC, when {name} was registered: data, base model, "
    reason += "settings, code and libraries are the same."
    announce(reason)
    return Completed(name="Skipped", message=reason)


ERROR_IN_A_STATE = re.compile(rf"\b({UserError.__name__}|{TemporaryError.__name__}):")


class OneLine(logging.Filter):
    """Takes the traceback off a record about a `UserError` or `TemporaryError`: the one line says what to do."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record where needed; drop a state's repetition of the error."""
        if str(record.msg).startswith("Finished in state") and ERROR_IN_A_STATE.search(record.getMessage()):
            return False
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        if isinstance(error, UserError | TemporaryError):
            record.msg, record.args = str(error), ()
            record.exc_info = record.exc_text = None
        return True


def show_user_errors_as_one_line() -> None:
    """Apply `OneLine` to Prefect's run logs, once."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logger = logging.getLogger(name)
        if not any(isinstance(log_filter, OneLine) for log_filter in logger.filters):
            logger.addFilter(OneLine())


def in_one_line(parameter: str) -> WrapValidator:
    """For the annotation of a flow's parameter: its faults are told as those of a preset are.

    Prefect's pages check parameters before a run is made; a schedule makes runs of what an earlier version has saved.

    Args:
        parameter: its name.

    Returns:
        A validator that raises `UserError` in place of pydantic's report.
    """

    def validated(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        try:
            return validate(value)
        except ValidationError as error:
            show_user_errors_as_one_line()
            raise settings_error(error, parameter) from None

    return WrapValidator(validated)
