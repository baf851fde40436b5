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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from tasks.engine.remote import Remote

R = TypeVar("R", bound=BaseModel)


class Artifact(BaseModel):
    """A reference to files on disk, small enough to pass between processes."""

    model_config = ConfigDict(frozen=True)

    kind: str
    """What it is: `model`, `dataset`, `adapter`, `merged`, `gguf` …"""
    path: Path
    """Directory that holds the files; in a record relative to the store, unless the files lie elsewhere."""
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
    sha256 = _sha256_of_content if time.time() - changed > 1 else _sha256_of_content.__wrapped__
    return sha256(path, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@functools.cache
def _sha256_of_content(path: Path, *_marks: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reference(kind: str, directory: Path, names: Iterable[str], facts: dict[str, Any]) -> Artifact:
    """Refer to files where they are, such as a user's model directory or the Hub's cache.

    Args:
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
    """Where all artifacts are kept, and the records which say what is cached."""

    root: Path
    """A directory of this machine."""
    uri: str | None = None
    """Where artifacts and records are kept for other machines too; none: nowhere."""

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

    @cached_property
    def remote(self) -> Remote | None:
        """What is behind the URI."""
        return Remote(self.uri) if self.uri else None

    @contextmanager
    def draft(self, kind: str) -> Iterator[Draft]:
        """Yield a draft; on success it becomes an artifact, on any error it is removed."""
        with self._directory(kind) as directory:
            draft = Draft(directory)
            yield draft
            names = [p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()]
            draft.artifact = self._publish(reference(kind, directory, names, draft.facts))

    def portable(self, artifact: Artifact) -> Artifact:
        """The artifact as it is recorded: no path of this machine, unless its files lie outside the store."""
        inside = artifact.path.is_relative_to(self.root)
        return artifact.model_copy(update={"path": artifact.path.relative_to(self.root)}) if inside else artifact

    def located(self, artifact: Artifact) -> Artifact:
        """The artifact as it is used: with the path on this machine, where its files are or would be."""
        return artifact.model_copy(update={"path": self.root / artifact.path})

    def holds(self, artifact: Artifact) -> bool:
        """Say whether its files are whole on this machine, or else all there at the URI."""
        return artifact.is_whole() or self._at_uri(artifact)

    def bring(self, artifact: Artifact) -> Artifact:
        """Fetch what is not whole on this machine from the URI, if it is there, and comes whole."""
        if self.remote and not artifact.is_whole() and self._at_uri(artifact):
            with self._directory(artifact.kind) as directory:
                for name in artifact.files:
                    self.remote.pull(f"{self.portable(artifact).path.as_posix()}/{name}", directory / name)
                fetched = artifact.model_copy(update={"path": directory})
                if fetched.is_whole():
                    self._publish(fetched)
        return artifact

    def share(self, artifact: Artifact) -> Artifact:
        """Write its files to the URI, unless they lie outside the store; return the artifact."""
        path = self.portable(artifact).path
        if self.remote and not path.is_absolute():
            for name in artifact.files:
                self.remote.push(artifact.path / name, f"{path.as_posix()}/{name}")
        return artifact

    @contextmanager
    def new_file(self, name: str) -> Iterator[Path]:
        """Yield a path to write to; the file appears under its name, here and at the URI, when the block has ended."""
        with self._directory("file") as directory:
            path = directory / Path(name).name
            yield path
            if self.remote:
                self.remote.push(path, name)
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            path.replace(self.root / name)

    def bring_files(self, directory: str) -> None:
        """Fetch the files of a directory at the URI that are not on this machine."""
        for name in self.remote.sizes(directory) if self.remote else ():
            if self.remote and not (self.root / directory / name).is_file():
                self.remote.pull(f"{directory}/{name}", self.root / directory / name)

    def _at_uri(self, artifact: Artifact) -> bool:
        path = self.portable(artifact).path
        if self.remote is None or path.is_absolute():
            return False
        sizes = self.remote.sizes(path.as_posix())
        return sum(sizes.get(name, -1) for name in artifact.files) == artifact.size

    @contextmanager
    def _directory(self, kind: str) -> Iterator[Path]:
        drafts = self.root / "drafts"
        drafts.mkdir(parents=True, exist_ok=True)
        directory = Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=drafts))
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def _publish(self, drafted: Artifact) -> Artifact:
        """Move a whole artifact to where its kind and digest say."""
        target = self.root / drafted.kind / drafted.digest[:16]
        target.parent.mkdir(parents=True, exist_ok=True)
        published = drafted.model_copy(update={"path": target})
        if not published.is_whole():
            if target.exists():
                shutil.rmtree(target)
            drafted.path.chmod(0o755)
            drafted.path.rename(target)
        return published


def artifacts_in(result: BaseModel) -> Iterator[Artifact]:
    """All artifacts in a result."""
    if isinstance(result, Artifact):
        yield result
    else:
        for name in type(result).model_fields:
            if isinstance(value := getattr(result, name), BaseModel):
                yield from artifacts_in(value)


def each_artifact(result: R, change: Callable[[Artifact], Artifact]) -> R:
    """The same result with each artifact changed."""
    if isinstance(result, Artifact):
        return change(result)  # type: ignore[return-value]
    values = {name: getattr(result, name) for name in type(result).model_fields}
    changed = {name: each_artifact(value, change) for name, value in values.items() if isinstance(value, BaseModel)}
    return result.model_copy(update=changed)
