"""The rows that trainings here are made with, and the training that others are held against."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from tasks.engine.artifacts import Artifact

if TYPE_CHECKING:
    from tests.support.trainings import Run


@pytest.fixture(scope="session")
def dataset(tokenized_rows: Callable[[int, int], Artifact]) -> Artifact:
    """Sixteen rows to train on, four to validate on."""
    return tokenized_rows(16, 4)


@pytest.fixture(scope="session")
def baseline(tiny_model: Artifact, dataset: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """AdamW without GRIT."""
    from tests.support.trainings import Run

    return Run(tmp_path_factory.mktemp("baseline"), tiny_model, dataset)
