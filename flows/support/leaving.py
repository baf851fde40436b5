"""How a command leaves Python."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from typing import NoReturn


def interrupted() -> int:
    """Say that Ctrl-C has stopped the command, and return the exit status that shells count for it."""
    sys.stderr.write("stopped\n")
    return 130


def leave(status: int) -> NoReturn:
    """Leave Python with an exit status, quietly."""
    # What to do next stays the last line. Registered last, it runs before Prefect's "Stopping temporary server".
    atexit.register(logging.disable)
    if status > 128:  # Prefect's threads complain of the server, which the same Ctrl-C has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    sys.exit(status)
