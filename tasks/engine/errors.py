"""The two kinds of failure that the pipeline tells apart: the user's to put right, and passing ones."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import httpx
import httpx2
import requests

NO_ANSWER = (
    *(httpx.TransportError, httpx2.TransportError),  # huggingface-hub uses the one before its version 2, then the other
    *(requests.ConnectionError, requests.Timeout, socket.gaierror),
)
"""What HTTP clients raise where nobody answers."""
BUSY = "devices are busy or unavailable"
"""CUDA's words for a GPU that another process has to itself."""


class UserError(Exception):
    """Something that the user can put right. Shown as one line, never as a traceback, never retried.

    Args:
        what: what is wrong, without a full stop.
        where: the file, line, setting or name it was found in.
        fix: what to do about it, as a sentence, or a command after a colon.
    """

    def __init__(self, what: str, *, where: object, fix: str) -> None:
        super().__init__(what, str(where), fix)
        self.what, self.where, self.fix = what, str(where), fix

    def __str__(self) -> str:
        problem = " ".join(f"{self.where}: {self.what}.".split())
        return f"{problem} {self.fix}"  # a command in it keeps its spaces

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.where, self.fix)


class TrainingError(UserError):
    """A training that came to nothing, by its settings or its data: one by another method may well succeed."""


def _rebuild(kind: type[UserError], what: str, where: str, fix: str) -> UserError:
    return kind(what, where=where, fix=fix)


class TemporaryError(Exception):
    """A failure that may pass by itself, such as a server that does not answer: worth another attempt."""


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
FORBIDDEN = (errno.EACCES, errno.EPERM)
"""Of a file. A firewall says it of connections, and then there is no file name."""


def unwritable(error: BaseException | None, store: Path) -> UserError | None:
    """What the user is told where an error comes from a full disk, a quota, or no right to write; none otherwise.

    Args:
        error: which; what it was raised from is looked at too. Libraries that are not written in Python tell the cause
            in the text alone.
        store: blamed where the error names no file.
    """
    while error is not None:
        number, name = (error.errno, error.filename) if isinstance(error, OSError) else (None, None)
        in_text = [code for code in (*FULL, errno.EACCES) if os.strerror(code) in str(error)]
        if number in FULL or (number in FORBIDDEN and name) or (number is None and in_text):
            return _unwritable(os.strerror(number or in_text[0]), name, store)
        error = error.__cause__ or error.__context__
    return None


def _unwritable(reason: str, name: object, store: Path) -> UserError:
    file = Path(os.fsdecode(name)) if isinstance(name, str | bytes | os.PathLike) else None
    if file and file.is_absolute() and not file.is_relative_to(store):
        fix = "Free some space or give the right to write there; finished stages are cached."
        return UserError(f"this cannot be written to: {reason}", where=file, fix=fix)
    return unwritable_store(store, reason)


def unwritable_store(directory: object, reason: str) -> UserError:
    """What the user is told of a store that cannot be written."""
    fix = "Free some space or give the right to write, or point `store` elsewhere; finished stages are cached."
    return UserError(f"this cannot be written to: {reason}", where=directory, fix=fix)


def is_temporary(error: BaseException) -> bool:
    """Say whether another attempt may succeed: network trouble, overloaded servers, a busy GPU, nothing else."""
    response = getattr(error, "response", None)
    if (status := getattr(response, "status_code", None)) is not None:
        return status == 429 or status >= 500
    return isinstance(error, (TemporaryError, ConnectionError, TimeoutError, *NO_ANSWER)) or BUSY in str(error)
