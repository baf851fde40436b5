"""Numbered records in the store, one JSON file each: written once, read by any run and any machine, never changed.

A later version reads them too: what it adds to a record has a default.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from tasks.engine.artifacts import Store
from tasks.engine.errors import UserError

R = TypeVar("R", bound=BaseModel)


def append(store: Store, directory: str, record: BaseModel) -> None:
    """Write a record, here and at the store's URI.

    Args:
        directory: the kind of record.
    """
    store.bring_files(directory)
    text = record.model_dump_json(indent=2) + "\n"
    # Numbered, since a clock may be set back.
    number = 1 + max(map(_number, _files(store, directory)), default=0)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    name = f"{directory}/{number:06d}-{datetime.now(UTC):%Y-%m-%dT%H-%M-%S}-{digest}.json"
    with store.new_file(name) as path:
        path.write_text(text, encoding="utf-8")


def entries(store: Store, directory: str, kind: type[R]) -> Iterator[tuple[Path, R]]:
    """The records with their files, newest first; one that cannot be read counts as none.

    Args:
        directory: the kind of record.
        kind: what they are read as.
    """
    store.bring_files(directory)
    for path in sorted(_files(store, directory), key=lambda path: (_number(path), path.name), reverse=True):
        if (record := _read(path, kind)) is not None:
            yield path, record


def insist_on_all(store: Store, directory: str, kind: type[BaseModel]) -> None:
    """Refuse a journal with a record that cannot be read, for those who remove what no record names.

    Args:
        directory: the kind of record.
        kind: what they are read as.

    Raises:
        UserError: a record is damaged, or written by a version whose records this one does not read.
    """
    store.bring_files(directory)
    for path in sorted(_files(store, directory)):
        if _read(path, kind) is None:
            what = "this version cannot read the record, and could remove what it names"
            fix = "Use the version that wrote it, or delete the file, here and at `store_uri`: what it names goes."
            raise UserError(what, where=path, fix=fix)


def _read(path: Path, kind: type[R]) -> R | None:
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _number(path: Path) -> int:
    """What orders the records: their number, or the year in those of a version without numbers, which are older."""
    return int(path.name.partition("-")[0])


def _files(store: Store, directory: str) -> Iterator[Path]:
    return (store.root / directory).glob("[0-9]*-*.json")
