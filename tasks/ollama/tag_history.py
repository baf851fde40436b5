"""What is known of the versions of a model: where each came from, how it scored, and which has been in use when."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import datetime
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel

from tasks.engine.artifacts import Artifact, Store
from tasks.engine.journal import append, entries
from tasks.export.checks import Check

TAGS = "tags"
PORT = 11434
"""Of an address without scheme and port, as Ollama reads it."""


class TagRecord(BaseModel):
    """A judgement of a version, or a rollback. Digests are those of Ollama's list."""

    at: datetime
    """In UTC."""
    event: Literal["judged", "rolled back"]
    place: str
    """Where it is registered: a server's address or a model directory."""
    name: str
    """The model's name with the tag that is in use, such as llama3-grit:latest."""
    version: str
    """The version's own name, such as llama3-grit:2026-11-23-1a2b3c4d."""
    digest: str
    """Of the version."""
    in_use: str | None
    """Digest of what `name` stands for since."""
    before: str | None = None
    """Digest of what it stood for until then."""
    kept_as: str | None = None
    """Another name which that one was given, where it was nobody's version."""
    withdrawn: tuple[str, ...] = ()
    """Digests that a rollback has taken out of use: they are not promoted again."""
    checks: tuple[Check, ...] = ()
    """Of a judgement."""
    gguf_sha256: str = ""
    merged: Artifact | None = None
    """The weights that it was made from, to be scored on other rows."""
    provenance: dict[str, Any] = {}
    """Of a judgement: data, settings, code, scores."""

    @property
    def promoted(self) -> bool:
        """Whether the version is in use since."""
        return self.in_use is not None and self.in_use == self.digest


class History:
    """The records of one name at one place.

    Args:
        store: where they are.
        place: where the model is registered.
        name: the model's name with the tag that is in use.
    """

    def __init__(self, store: Store, place: str, name: str) -> None:
        records = (record for _, record in entries(store, TAGS, TagRecord))
        wanted = same_place(place), name.lower()
        self.records = [record for record in records if (same_place(record.place), record.name.lower()) == wanted]
        """Newest first."""

    def judgements(self) -> Iterator[TagRecord]:
        """The newest judgement of each version."""
        seen = set()
        for record in self.records:
            if record.event == "judged" and record.digest not in seen:
                seen.add(record.digest)
                yield record

    def of(self, digest: str | None) -> TagRecord | None:
        """The newest judgement of the version of that digest, if it is one."""
        return next((record for record in self.judgements() if record.digest == digest), None)

    def withdrawn(self) -> set[str]:
        """Versions that a rollback has taken out of use, and no later one has put back."""
        digests: set[str] = set()
        for record in reversed(self.records):
            digests |= set(record.withdrawn)
            digests -= {record.in_use or ""} if record.event == "rolled back" else set()
        return digests

    def names(self) -> dict[str, str]:
        """The name of each version by its digest, of others that were in use too."""
        kept = {record.before: record.kept_as for record in self.records if record.before and record.kept_as}
        return kept | {record.digest: record.version for record in self.records}

    def ever_in_use(self) -> set[str]:
        """Digests of all that the name has stood for."""
        return {digest for record in self.records for digest in (record.before, record.in_use) if digest}

    def in_use_before(self, digest: str | None) -> list[str]:
        """What a version has followed in use, newest first: what a rollback has left behind is not among it.

        Args:
            digest: of the version; all that can be gone back to, if it has not been in use.
        """
        order: list[str] = []
        for record in reversed(self.records):
            for version in (record.before, record.in_use):
                if version is None or order[-1:] == [version]:
                    continue
                if version in order and record.event == "rolled back":
                    del order[order.index(version) :]
                elif version in order:
                    order.remove(version)
                order.append(version)
        return list(reversed(order[: order.index(digest)] if digest in order else order))


def same_place(place: str) -> str:
    """A place's one name among those that it can be called by: links and the local machine's names are resolved.

    Args:
        place: a server's address or a model directory.
    """
    if place.startswith("/"):
        return os.path.realpath(place)
    parts = urlsplit(place if "//" in place else f"http://{place}")
    host = "127.0.0.1" if parts.hostname in (None, "localhost", "0.0.0.0", "::1") else parts.hostname  # noqa: S104, binds nothing
    default = {"http": 80, "https": 443}[parts.scheme] if "//" in place and parts.scheme in ("http", "https") else PORT
    return f"{host}:{parts.port or default}{parts.path.rstrip('/')}"


def ggufs_in_use(store: Store) -> set[str]:
    """SHA-256 of each GGUF that was in use, under some name at some place, when that was last looked at.

    Args:
        store: where the records are.
    """
    names = {(same_place(record.place), record.name) for _, record in entries(store, TAGS, TagRecord)}
    histories = [History(store, place, name) for place, name in names]
    versions = [history.of(history.records[0].in_use) for history in histories]
    return {version.gguf_sha256 for version in versions if version}


def remember_tag(store: Store, record: TagRecord) -> None:
    """Write a record."""
    append(store, TAGS, record)
