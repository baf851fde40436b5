"""The log of a run, which Prefect shows on its pages."""

from __future__ import annotations

import logging


def run_logger() -> logging.Logger | logging.LoggerAdapter[logging.Logger]:
    """The running task's or flow's logger; a plain one where a stage is called as a plain function."""
    from prefect import get_run_logger  # takes seconds, which a training's process has no need for
    from prefect.exceptions import MissingContextError

    try:
        return get_run_logger()
    except MissingContextError:
        return logging.getLogger(__name__)
