"""What a flow shows in Prefect's log and pages."""

from __future__ import annotations

import logging
import re

from prefect.artifacts import create_markdown_artifact

from tasks.artifacts import Artifact
from tasks.errors import TemporaryError, UserError


def publish(report: Artifact) -> None:
    """Put the short report on the flow run's page."""
    text = (report.path / "report.md").read_text(encoding="utf-8")
    create_markdown_artifact(text, key="report", description=f"Full report: {report.path / 'report.html'}")


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
        if not any(isinstance(known, OneLine) for known in logger.filters):
            logger.addFilter(OneLine())
