"""JSON files, read as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """The value that a JSON file holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_json_lines(path: Path) -> list[Any]:
    """The values of a file that holds one a line. Texts in them may hold other separators of lines than the line feed.

    Args:
        path: of the file.
    """
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
