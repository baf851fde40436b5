"""What is costly to make and the same for a whole run: made by the first of its processes, read by all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def shared_directory(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A directory that lives as long as the run.

    Args:
        factory: pytest's; each of xdist's processes has a directory of its own beside the others'.
        name: unlike all others.
        make: fills an empty directory; called in one process only.

    Returns:
        The directory, whole. Do not change what it holds.
    """
    own = factory.getbasetemp()
    place = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / f"shared-{name}"
    with FileLock(f"{place}.lock"):
        if not place.is_dir():
            draft = Path(tempfile.mkdtemp(dir=place.parent))
            make(draft)
            draft.rename(place)
    return place
