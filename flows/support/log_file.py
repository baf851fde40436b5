"""The log file of a command: all that it, its libraries and its children print."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import NamedTuple, TextIO

from tasks.engine.artifacts import Store
from tasks.engine.errors import unwritable_store

SHORT_SECONDS = 5
"""A bar that has not lasted longer is not worth showing."""
BAR = re.compile(
    r"(?P<label>[^\r\n|]*?):? *(?P<percent>\d+)%\|[^|\r\n]*\| (?P<count>\S+/\S+) \[(?P<elapsed>[\d:]+)<(?P<left>[\d:]+)"
)
"""A state of tqdm's progress bar, as libraries print it."""


def new_log_file(store: Store, command: str) -> Path:
    """Where a command that begins now writes its log; pruning removes old ones.

    Args:
        store: whose directory holds the logs.
        command: its name.

    Raises:
        UserError: the store cannot be written to.
    """
    log = store.root / "logs" / f"{datetime.now():%Y-%m-%d-%H%M%S}-{command}-{os.getpid()}.log"
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
    except OSError as error:
        raise unwritable_store(store.root, os.strerror(error.errno) if error.errno else str(error)) from error
    return log


@contextmanager
def printing_into(log: Path) -> Iterator[TextIO]:
    """Within this block all that this process and its children print goes into a file.

    Args:
        log: the file; what is there already stays.

    Yields:
        What the standard output was before.
    """
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.flush()
    sys.stderr.flush()
    former = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    with (
        log.open("ab") as file,
        os.fdopen(os.dup(1), "w", encoding=encoding, errors="replace", buffering=1) as terminal,
    ):
        try:
            for descriptor in former:
                os.dup2(file.fileno(), descriptor)
            yield terminal
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, copy in former.items():
                os.dup2(copy, descriptor)
                os.close(copy)


class Bar(NamedTuple):
    """How far something is."""

    text: str
    share: float
    """From 0 to 1."""


class BarReader:
    """Finds the progress bars of libraries in the log that they print into.

    Args:
        log: the file, from its present end on.
    """

    def __init__(self, log: Path) -> None:
        self._log, self._read, self._rest = log, log.stat().st_size, ""

    def newest(self) -> Bar | None:
        """The newest bar among what was printed since the last call, if it is at work for more than some seconds."""
        with self._log.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        self._read += len(new)
        text = self._rest + new.decode("utf-8", errors="replace")
        self._rest = text[-500:]  # a bar may be cut in two
        states = list(BAR.finditer(text))
        if not states:
            return None
        state = states[-1]
        if state["percent"] == "100" or _seconds(state["elapsed"]) < SHORT_SECONDS:
            return None
        return Bar(f"{state['label'].strip()} {state['count']}, {state['left']} left", int(state["percent"]) / 100)


def _seconds(clock: str) -> int:
    seconds = 0
    for part in clock.split(":"):
        seconds = 60 * seconds + int(part or 0)
    return seconds
