"""What a command line shows while stages run: a line for each, and below them how far the present one is."""

from __future__ import annotations

import logging
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import NamedTuple, Self

from pydantic import BaseModel
from rich.console import Console, RenderableType
from rich.filesize import decimal
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from flows.support.log_file import BarReader, new_log_file, printing_into
from tasks.engine.artifacts import Store, artifacts_in
from tasks.engine.display import Display, TrainingProgress, showing
from tasks.engine.paths import REPOSITORY

MINUTE = 60.0
"""Seconds after which a file, where nothing can be drawn anew, gets a further line of how far the stage is."""
LOOK_SECONDS = 0.5
RUN_LOGGERS = ("prefect.flow_runs", "prefect.task_runs")
RETRY = re.compile(r"failed with \w+: (?P<error>.*) - (?P<attempt>Retry .*)")
"""Prefect's announcement of a further attempt."""


@contextmanager
def terminal_for(command: str, store: Store, widest: str = "check_vocabulary") -> Iterator[Path]:
    """Do what `terminal_with` does, with a new log file in the store.

    Args:
        command: its name, for that of the file.
        store: whose directory holds the file.
        widest: about the longest name of a stage.

    Yields:
        The file.

    Raises:
        UserError: the store cannot be written to.
    """
    log = new_log_file(store, command)
    with terminal_with(log, widest):
        yield log


@contextmanager
def terminal_with(log: Path, widest: str = "") -> Iterator[None]:
    """Within this block the terminal shows the stages alone; all else that is printed goes into a log file.

    Where the block ends in an error, or is stopped, the file's path is printed.

    Args:
        log: the file.
        widest: about the longest name of a stage.
    """
    log.touch()
    try:
        with printing_into(log) as stream:
            console = Console(file=stream, highlight=False, soft_wrap=True)
            with Terminal(console, BarReader(log), len(widest) + 4) as terminal, _shown_by(terminal):
                yield
    except BaseException:
        print(f"\nLog:    {log}", flush=True)
        raise


class _Present(NamedTuple):
    """What runs now."""

    stage: str
    began: float
    detail: str = ""
    share: float | None = None
    """From 0 to 1, where it is known."""
    is_training: bool = False


class Terminal(Display):
    """Draws on a terminal; into a file it writes line after line.

    Args:
        console: where.
        bars: finds how far libraries say that they are.
        width: of the column with the stages' names, in characters.
    """

    def __init__(self, console: Console, bars: BarReader, width: int) -> None:
        self._console, self._bars, self._width = console, bars, width
        self._present = _Present("Prefect starts", time.monotonic())
        self._has_heading = False
        self._ends = threading.Event()
        self._watch = threading.Thread(target=self._watch_bars, daemon=True)
        self._live = Live(
            get_renderable=self._drawn,
            console=console,
            transient=True,
            refresh_per_second=4,
            redirect_stdout=False,  # what is printed goes into the log
            redirect_stderr=False,
        )

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._watch.join()
        self._live.stop()

    def begins(self, stage: str) -> None:
        """Draw from now on how long the stage has been running."""
        self._present = _Present(stage, time.monotonic())

    def ends(self, stage: str, seconds: float, result: BaseModel | None, *, is_cached: bool) -> None:
        """Print the stage's line."""
        self._present = _Present("", time.monotonic())
        if not self._has_heading:
            self._has_heading = True
            self._line("stage", "time", "result", style="bold")
        if result is None:
            self._line(stage, duration(seconds), "failed" if isinstance(sys.exception(), Exception) else "stopped")
        else:
            self._line(stage, "cached" if is_cached else duration(seconds), _about(result, is_cached))

    def trains(self, progress: TrainingProgress) -> None:
        """Draw how far the training is."""
        share = progress.step / progress.steps
        self._present = self._present._replace(detail=str(progress), share=share, is_training=True)

    def notice(self, message: str) -> None:
        """Print it."""
        self._console.print(f"{message.rstrip('.')}.", markup=False)

    def warn(self, message: str) -> None:
        """Print a warning."""
        self._console.print(Text.assemble(("warning: ", "yellow"), message))

    def _line(self, stage: str, period: str, result: str, style: str = "") -> None:
        self._console.print(f"{stage:<{self._width}}{period:>12}   {result}".rstrip(), style=style, markup=False)

    def _watch_bars(self) -> None:
        written = time.monotonic()
        while not self._ends.wait(LOOK_SECONDS):
            present, bar = self._present, self._bars.newest()
            if bar and not present.is_training:
                self._present = present = present._replace(detail=bar.text, share=bar.share)
            now = time.monotonic()
            if not self._console.is_terminal and present.detail and now - max(written, present.began) >= MINUTE:
                written = now
                self._console.print(f"{present.stage}: {present.detail}", markup=False)

    def _drawn(self) -> RenderableType:
        present = self._present
        if not present.stage:
            return Text()
        row = Table.grid(padding=(0, 1), expand=True)
        for ratio in (None, None, 1, None):  # the bar has what the words leave
            row.add_column(no_wrap=True, ratio=ratio)
        since = duration(time.monotonic() - present.began)
        bar = Text() if present.share is None else ProgressBar(total=1.0, completed=present.share)
        row.add_row(present.stage, since, bar, Text(present.detail))
        return row


@contextmanager
def _shown_by(terminal: Terminal) -> Iterator[None]:
    """Show stages, the warnings of this project's code, and Prefect's word of another attempt."""
    handler = _Warnings(terminal)
    loggers = [logging.getLogger(name) for name in RUN_LOGGERS]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with showing(terminal):
            yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


class _Warnings(logging.Handler):
    def __init__(self, terminal: Terminal) -> None:
        super().__init__(logging.INFO)
        self._terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        if retry := RETRY.search(record.getMessage()):
            self._terminal.warn(f"{retry['error']} {retry['attempt']}")
        elif record.levelno >= logging.WARNING and Path(record.pathname).is_relative_to(REPOSITORY):
            self._terminal.warn(record.getMessage())


def duration(seconds: float) -> str:
    """A period in words: 4.2 s, 4 min 12 s, 2 h 5 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _about(result: BaseModel, is_cached: bool) -> str:
    artifacts = list(artifacts_in(result))
    size = decimal(sum(artifact.size for artifact in artifacts))
    text = f"{' and '.join(artifact.kind for artifact in artifacts)}, {size}"
    if not is_cached:
        return text
    made = datetime.fromtimestamp(min(artifact.path.stat().st_mtime for artifact in artifacts))
    return f"{text}, of {made:%Y-%m-%d %H:%M}"
