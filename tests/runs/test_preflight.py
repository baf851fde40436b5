"""What is checked before a training, of the data set that it would see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import prefect  # noqa: F401 - replaces the root logger's handlers, which no test should see happen
import pytest

from tasks.engine.artifacts import Artifact, reference
from tasks.engine.errors import UserError
from tasks.engine.planning import planning
from tasks.runs.preflight import check_validations
from tasks.settings.presets import load_settings

STEPS = {
    "training.max_steps": 20, "training.per_device_batch_size": 5, "training.gradient_accumulation_steps": 1,
}  # fmt: skip


@pytest.fixture
def dataset(tmp_path: Path) -> Artifact:
    """Of which 20 steps of 5 rows see 1000 supervised tokens."""
    facts = {"rows": {"train": 9}, "tokens": {"train": 900}, "supervised_tokens": {"train": 90}, "max_length": 512}
    return reference("dataset", tmp_path, [], facts)


@pytest.mark.parametrize(("every", "warned"), [(999, False), (1000, True), (None, False)])
def test_a_training_that_ends_before_its_first_validation_is_warned_of(
    dataset: Artifact, caplog: pytest.LogCaptureFixture, every: int | None, warned: bool
) -> None:
    settings = load_settings("demo", STEPS | {"training.eval_tokens": every})
    with planning():
        check_validations(settings, dataset)
    assert not caplog.messages, "a plan is made several times"
    check_validations(settings, dataset)
    assert bool(caplog.messages) == warned
    assert not warned or "1000 supervised tokens, and 1000 pass between two validations. Use 100," in caplog.text


@pytest.mark.parametrize("choice", [{"training.keep_best": True}, {"training.early_stopping_patience": 2}])
def test_and_refused_where_it_would_choose_by_them(dataset: Artifact, choice: dict[str, Any]) -> None:
    check_validations(load_settings("demo", STEPS | choice | {"training.eval_tokens": 999}), dataset)
    with pytest.raises(UserError, match="nothing to choose by"):
        check_validations(load_settings("demo", STEPS | choice | {"training.eval_tokens": 1000}), dataset)
