"""Local files of rows: found, checked, read."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.engine.errors import UserError
from tasks.settings.finetune import DataSettings

GENERATED = "generated:extraction"
SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
SPLITS = ("train", "validation", "test")


def check_files(settings: DataSettings) -> dict[str, Path]:
    """Check that local files are there and of a kind that can be read, without reading them.

    Returns:
        Their paths by split.

    Raises:
        UserError: one is not.
    """
    sources = zip(SPLITS, (settings.source, settings.validation_source, settings.test_source), strict=True)
    return {
        split: checked_file(source) for split, source in sources if source and source != GENERATED and is_file(source)
    }


def read_rows(path: Path, name: object) -> list[Mapping[str, Any]]:
    """Read the rows of a JSON, JSON Lines, CSV or Parquet file.

    Args:
        name: what an error message calls it.

    Raises:
        UserError: empty or broken, with the line where there is one.
    """
    if path.suffix == ".parquet":
        rows = _parquet(path, name)
    else:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"not UTF-8 at byte {error.start}", where=name, fix="Convert the file to UTF-8.") from None
        rows = {".json": _json, ".jsonl": _jsonl, ".csv": _csv}[path.suffix](text, name)
    if not rows:
        raise UserError("the file holds no rows", where=name, fix="Give a file with at least one row.")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise UserError(
                f"row {number} is {type(row).__name__}, not an object", where=name, fix="Make each row a JSON object."
            )
    return rows


def checked_file(source: str) -> Path:
    """The path of a local file that can be read.

    Raises:
        UserError: it is not there, or of another kind.
    """
    path = Path(source).expanduser()
    if path.suffix not in SUFFIXES:
        raise UserError("unsupported kind of file", where=path, fix=f"Use one of {', '.join(SUFFIXES)}.")
    if not path.is_file():
        raise UserError("no such file", where=path, fix="Correct data.source.")
    return path


def is_file(source: str) -> bool:
    """Tell a file from a Hub id (`owner/name`, or an old bare name)."""
    path = Path(source).expanduser()
    looks_like_a_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    return looks_like_a_path or path.suffix in SUFFIXES or path.exists() or ("/" not in source and path.suffix != "")


def _json(text: str, name: object) -> list[Any]:
    if not text.strip():
        return []
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise _broken(error, error.lineno, name) from None
    except RecursionError:
        raise UserError("JSON nested too deeply to be read", where=name, fix="Make each row a flat object.") from None
    if not isinstance(rows, list):
        raise UserError(
            f"the file holds {type(rows).__name__}, not a list of rows", where=name, fix="Wrap the rows in [ ]."
        )
    return rows


def _jsonl(text: str, name: object) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise _broken(error, number, name) from None
            except RecursionError:
                what = f"JSON nested too deeply to be read at line {number}"
                raise UserError(what, where=name, fix="Make each row a flat object.") from None
    return rows


def _csv(text: str, name: object) -> list[Any]:
    csv.field_size_limit(2**31 - 1)  # the default takes a long text for a missing quote
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise UserError(
            f"broken CSV at line {reader.line_num}: {error}", where=name, fix="Correct that line."
        ) from None
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise UserError(
                f"row {number} has another number of fields than the header", where=name, fix="Correct that row."
            )
    return rows


def _parquet(path: Path, name: object) -> list[Any]:
    try:
        rows: list[Any] = pq.read_table(path).to_pylist()
    except pa.ArrowException as error:
        raise UserError(f"not a readable Parquet file: {error}", where=name, fix="Write the file anew.") from None
    return rows


def _broken(error: json.JSONDecodeError, line: int, name: object) -> UserError:
    return UserError(
        f"broken JSON at line {line}, column {error.colno}: {error.msg.removesuffix(' starting at')}",
        where=name,
        fix="Correct that line.",
    )
