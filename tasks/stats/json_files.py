"""JSON files that stages leave for later ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """The content of a JSON file in UTF-8."""
    return json.loads(path.read_text(encoding="utf-8"))
