"""A place outside the machine for artifacts and records, at any address that fsspec knows (file://, s3://, gs:// …)."""

from __future__ import annotations

import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from tasks.engine.errors import FULL, TemporaryError, UserError
from tasks.engine.logs import run_logger

R = TypeVar("R")
PATIENCE, UNATTENDED_PATIENCE = 30.0, 600.0
"""Seconds for which what fails there is tried again; longer in a deployed run, which nobody waits for."""
FINAL = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError, ImportError)
"""What no further attempt mends. Every service has errors of its own, so all others may pass."""


class Remote:
    """Files at a URI. What fails there is tried again for a while.

    Args:
        uri: where; with a protocol that fsspec knows.

    Raises:
        UserError: fsspec does not know the protocol, or lacks the package for it; in all methods: one may not write or
            read there.
        TemporaryError: in all methods: it kept failing.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        try:
            self.files, self.root = url_to_fs(uri)
        except (ImportError, ValueError) as error:
            fix = "Use an address that fsspec knows, such as file:///mnt/share or s3://bucket/path."
            raise UserError(str(error), where=f"store_uri {uri}", fix=fix) from None

    def holds(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return bool(self._try(lambda: self.files.isfile(self._path(name))))

    def sizes(self, directory: str) -> dict[str, int]:
        """Bytes of each file below a directory, by its path below it."""
        return {name: int(about["size"]) for name, about in self._find(f"{directory}/").items()}

    def contents(self) -> dict[str, tuple[int, float]]:
        """Bytes, and when it was written last in seconds since 1970, of each artifact and record, by its path."""
        contents: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
        for name, about in self._find("").items():
            entry = "/".join(name.split("/")[:2])
            size, newest = contents[entry]
            written = self._try(partial(self.files.modified, self._path(name)))
            contents[entry] = (size + int(about["size"]), max(newest, written.timestamp()))
        return dict(contents)

    def push(self, path: Path, name: str) -> None:
        """Write a file; it appears under its name when it is whole."""
        self._try(lambda: self._push(path, self._path(name)))

    def pull(self, name: str, path: Path) -> None:
        """Read a file into a new one, which appears when it is whole.

        Raises:
            FileNotFoundError: there is none of this name.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=path.parent) as directory:
            unfinished = Path(directory) / path.name
            self._try(lambda: self.files.get_file(self._path(name), str(unfinished)))
            unfinished.replace(path)

    def remove(self, name: str) -> None:
        """Remove a file, or a directory with all it holds, if it is there."""
        if self._try(lambda: self.files.exists(self._path(name))):
            self._try(lambda: self.files.rm(self._path(name), recursive=True))

    def _find(self, directory: str) -> dict[str, dict[str, Any]]:
        start = self._path(directory)
        files = self._try(lambda: self.files.find(start, detail=True))
        return {path.rpartition(start)[2]: about for path, about in files.items()}

    def _push(self, path: Path, target: str) -> None:
        self.files.makedirs(self.files._parent(target), exist_ok=True)
        if not isinstance(self.files, LocalFileSystem):
            with self.files.transaction, path.open("rb") as source, self.files.open(target, "wb") as file:
                shutil.copyfileobj(source, file, 2**20)
            return
        # A transaction would write to this machine's directory for temporary files, and copy from there.
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=Path(target).parent) as directory:
            unfinished = Path(directory) / path.name
            with path.open("rb") as source, unfinished.open("wb") as file:
                shutil.copyfileobj(source, file, 2**20)
            unfinished.replace(target)

    def _path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"

    def _try(self, action: Callable[[], R]) -> R:
        from prefect.runtime import deployment  # as in `tasks.engine.logs`

        try:
            return Retrying(
                retry=retry_if_exception(_may_pass),
                wait=wait_random_exponential(max=60),
                stop=stop_after_delay(UNATTENDED_PATIENCE if deployment.id else PATIENCE),
                before=lambda _: self.files.invalidate_cache(),
                before_sleep=self._tell,
                reraise=True,
            )(action)
        except FileNotFoundError:
            raise
        except Exception as error:
            if _may_pass(error):
                raise TemporaryError(f"store_uri {self.uri}: {type(error).__name__}: {error}") from error
            fix = "Give the right to read and write there, or free some space."
            raise UserError(str(error), where=f"store_uri {self.uri}", fix=fix) from error

    def _tell(self, attempt: RetryCallState) -> None:
        error = attempt.outcome.exception() if attempt.outcome else None
        run_logger().warning("store_uri %s: %s: %s; trying again", self.uri, type(error).__name__, error)


def _may_pass(error: BaseException) -> bool:
    full = isinstance(error, OSError) and error.errno in FULL
    return isinstance(error, Exception) and not isinstance(error, FINAL) and not full
