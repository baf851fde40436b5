"""Content-addressed outputs: what a stage made, referred to by path, digest, size and facts.

A stage writes into a draft directory; when it is whole it is renamed to `STORE/KIND/DIGEST`. A crash in between
leaves a draft behind, never half an artifact.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict


class Artifact(BaseModel):
    """A reference to files on disk, small enough to pass between processes."""

    model_config = ConfigDict(frozen=True)

    kind: str
    """What it is: `model`, `dataset`, `adapter`, `merged`, `gguf` …"""
    path: Path
    """Directory that holds the files."""
    files: dict[str, str]
    """SHA-256 in hexadecimal of each file, by its path below `path`."""
    size: int
    """Bytes of all files."""
    facts: dict[str, Any] = {}
    """JSON values worth knowing without opening a file; no part of the digest."""

    @property
    def digest(self) -> str:
        """SHA-256 over names and contents of all files."""
        return hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()

    def is_whole(self) -> bool:
        """Read every file and say whether all are as they were when the artifact was made."""
        return all(
            (self.path / name).is_file() and file_sha256(self.path / name) == sha256
            for name, sha256 in self.files.items()
        )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal; a process reads a file that has not changed only once."""
    stat = path.stat()
    changed = max(stat.st_mtime, stat.st_ctime)
    # Two changes within a tick of the file system's clock look like one.
    known = _known_sha256 if time.time() - changed > 1 else _known_sha256.__wrapped__
    return known(path, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@functools.cache
def _known_sha256(path: Path, *_marks: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reference(kind: str, directory: Path, names: Iterable[str], facts: dict[str, Any]) -> Artifact:
    """Refer to files where they are, such as a user's model directory or the Hub's cache.

    Args:
        kind: what it is.
        directory: where the files are.
        names: paths below the directory.
        facts: JSON values worth knowing.
    """
    files = {name: file_sha256(directory / name) for name in sorted(names)}
    size = sum((directory / name).stat().st_size for name in files)
    return Artifact(kind=kind, path=directory.absolute(), files=files, size=size, facts=facts)


@dataclass
class Draft:
    """An artifact in the making."""

    path: Path
    """Empty directory to write into."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Filled in by the stage."""
    artifact: Artifact | None = None
    """Set when the `with` block has ended."""

    def done(self) -> Artifact:
        """The finished artifact; to be called after the `with` block."""
        if self.artifact is None:
            raise RuntimeError("the draft is not finished: call done() after the with block")
        return self.artifact


@dataclass(frozen=True)
class Store:
    """The directory of all artifacts and of the records which say what is cached."""

    root: Path

    @property
    def results(self) -> Path:
        """Where Prefect keeps the JSON record of each stage's result."""
        return self.root / "results"

    @property
    def locks(self) -> Path:
        """Where runs lock what they compute, so that two of them compute it once."""
        directory = self.root / "locks"
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    @contextmanager
    def draft(self, kind: str) -> Iterator[Draft]:
        """Yield a draft; on success it becomes an artifact, on any error it is removed."""
        drafts = self.root / "drafts"
        drafts.mkdir(parents=True, exist_ok=True)
        directory = Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=drafts))
        try:
            draft = Draft(directory)
            yield draft
            names = [p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()]
            made = reference(kind, directory, names, draft.facts)
            draft.artifact = made.model_copy(update={"path": self._publish(made)})
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def _publish(self, made: Artifact) -> Path:
        target = self.root / made.kind / made.digest[:16]
        target.parent.mkdir(parents=True, exist_ok=True)
        if made.model_copy(update={"path": target}).is_whole():
            return target
        if target.exists():
            shutil.rmtree(target)
        made.path.chmod(0o755)
        made.path.rename(target)
        return target
