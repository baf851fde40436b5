"""Outputs of trainings that never ran, for what is computed from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.stats import estimates
from tests.support.made_up_comparison import MadeUp


@pytest.fixture
def fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bootstraps are short where their intervals are no matter."""
    monkeypatch.setattr(estimates, "RESAMPLES", 50)


@pytest.fixture
def outputs(tmp_path: Path) -> MadeUp:
    """A directory of outputs."""
    return MadeUp(tmp_path / "made-up")
