"""The two kinds of failure that the pipeline tells apart: the user's to put right, and passing ones."""

from __future__ import annotations

import httpx
import httpx2

NO_ANSWER = (httpx.TransportError, httpx2.TransportError)
"""What HTTP clients raise where nobody answers; huggingface-hub uses the one before its version 2, then the other."""


class UserError(Exception):
    """Something that the user can put right. Shown as one line, never as a traceback, never retried.

    Args:
        what: what is wrong, without a full stop.
        where: the file, line, setting or name it was found in.
        fix: what to do about it, as a sentence.
    """

    def __init__(self, what: str, *, where: object, fix: str) -> None:
        super().__init__(what, str(where), fix)
        self.what, self.where, self.fix = what, str(where), fix

    def __str__(self) -> str:
        return " ".join(f"{self.where}: {self.what}. {self.fix}".split())

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self.what, self.where, self.fix)


def _rebuild(what: str, where: str, fix: str) -> UserError:
    return UserError(what, where=where, fix=fix)


class TemporaryError(Exception):
    """A failure that may pass by itself, such as a server that does not answer: worth another attempt."""


def is_temporary(error: BaseException) -> bool:
    """Say whether another attempt may succeed: network trouble and overloaded servers, nothing else."""
    response = getattr(error, "response", None)
    if (status := getattr(response, "status_code", None)) is not None:
        return status == 429 or status >= 500
    return isinstance(error, (TemporaryError, ConnectionError, TimeoutError, *NO_ANSWER))
