"""The log of a run, which Prefect shows on its pages."""

from __future__ import annotations

import logging

from prefect import get_run_logger
from prefect.exceptions import MissingContextError


def run_logger() -> logging.Logger | logging.LoggerAdapter[logging.Logger]:
    """The running task's or flow's logger; a plain one where a stage is called as a plain function."""
    try:
        return get_run_logger()
    except MissingContextError:
        return logging.getLogger(__name__)
