"""The two kinds of failure that the pipeline tells apart: the user's to put right, and passing ones."""

from __future__ import annotations

import errno
import os

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


UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def unwritable(error: BaseException | None) -> str | None:
    """Why something cannot be written, if that is what an error comes from: a full disk, a quota, no right to write.

    Libraries that are not written in Python tell it in the text alone.
    """
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        for known in UNWRITABLE:
            if number == known or (known != errno.EPERM and os.strerror(known) in str(error)):
                return os.strerror(known)
        error = error.__cause__ or error.__context__
    return None


def unwritable_store(directory: object, reason: str) -> UserError:
    """What the user is told of it."""
    fix = "Free some space or give the right to write, or point `store` elsewhere; finished stages are cached."
    return UserError(f"this cannot be written to: {reason}", where=directory, fix=fix)


def is_temporary(error: BaseException) -> bool:
    """Say whether another attempt may succeed: network trouble and overloaded servers, nothing else."""
    response = getattr(error, "response", None)
    if (status := getattr(response, "status_code", None)) is not None:
        return status == 429 or status >= 500
    return isinstance(error, (TemporaryError, ConnectionError, TimeoutError, *NO_ANSWER))
