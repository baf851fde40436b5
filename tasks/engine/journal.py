"""Numbered records in the store, one JSON file each: written once, read by any run and any machine, never changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from tasks.engine.artifacts import Store

R = TypeVar("R", bound=BaseModel)


def append(store: Store, directory: str, record: BaseModel) -> None:
    """Write a record, here and at the store's URI.

    Args:
        directory: the kind of record.
    """
    store.bring_files(directory)
    text = record.model_dump_json(indent=2) + "\n"
    # Numbered, since a clock may be set back.
    numbers = (int(path.name.partition("-")[0]) for path in _files(store, directory))
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    name = f"{directory}/{1 + max(numbers, default=0):06d}-{datetime.now(UTC):%Y-%m-%dT%H-%M-%S}-{digest}.json"
    with store.new_file(name) as path:
        path.write_text(text, encoding="utf-8")


def entries(store: Store, directory: str, kind: type[R]) -> Iterator[tuple[Path, R]]:
    """The records with their files, newest first; one that cannot be read counts as none.

    Args:
        directory: the kind of record.
        kind: what they are read as.
    """
    store.bring_files(directory)
    for path in sorted(_files(store, directory), reverse=True):
        try:
            yield path, kind.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            continue


def _files(store: Store, directory: str) -> Iterator[Path]:
    return (store.root / directory).glob("[0-9]*-*.json")
