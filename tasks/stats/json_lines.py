"""Files of a JSON value a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json_lines(path: Path) -> list[Any]:
    """The values of a file's lines. Texts in them may hold other separators of lines than the line feed."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
