"""Outputs of trainings that never ran, for what is computed from them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.made_up_comparison import MadeUp


@pytest.fixture
def fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bootstraps are short where their intervals are no matter."""
    monkeypatch.setattr("tasks.stats.estimates.RESAMPLES", 50)


@pytest.fixture
def outputs(tmp_path: Path) -> MadeUp:
    """A directory of outputs."""
    from tests.support.made_up_comparison import MadeUp

    return MadeUp(tmp_path / "made-up")
