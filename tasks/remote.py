"""A place outside the machine for artifacts and records, at any address that fsspec knows (file://, s3://, gs:// …)."""

from __future__ import annotations

import shutil
from pathlib import Path

from fsspec.core import url_to_fs

from tasks.errors import UserError


class Remote:
    """Files at a URI.

    Args:
        uri: where; with a protocol that fsspec knows.

    Raises:
        UserError: fsspec does not know the protocol, or lacks the package for it.
    """

    def __init__(self, uri: str) -> None:
        try:
            self.files, self.root = url_to_fs(uri)
        except (ImportError, ValueError) as error:
            fix = "Use an address that fsspec knows, such as file:///mnt/share or s3://bucket/path."
            raise UserError(str(error), where=f"store_uri {uri}", fix=fix) from None

    def holds(self, name: str) -> bool:
        """Whether there is a file of this name."""
        self.files.invalidate_cache()
        return bool(self.files.isfile(self._path(name)))

    def sizes(self, directory: str) -> dict[str, int]:
        """Bytes of each file below a directory, by its path below it."""
        self.files.invalidate_cache()
        start = f"{self._path(directory)}/"
        found = self.files.find(start, detail=True)
        return {path.rpartition(start)[2]: int(about["size"]) for path, about in found.items()}

    def push(self, path: Path, name: str) -> None:
        """Write a file; it appears under its name when it is whole."""
        target = self._path(name)
        self.files.makedirs(self.files._parent(target), exist_ok=True)
        with (
            self.files.transaction,
            path.open("rb") as source,
            self.files.open(target, "wb") as file,
        ):
            shutil.copyfileobj(source, file, 2**20)

    def pull(self, name: str, path: Path) -> None:
        """Read a file into a new one, which appears when it is whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.unfinished")
        self.files.get_file(self._path(name), str(unfinished))
        unfinished.rename(path)

    def remove(self, name: str) -> None:
        """Remove a file, or a directory with all it holds, if it is there."""
        self.files.invalidate_cache()
        if self.files.exists(self._path(name)):
            self.files.rm(self._path(name), recursive=True)

    def _path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"
