from __future__ import annotations

import json
from pathlib import Path

import pytest

from tasks.engine.errors import TemporaryError, UserError
from tasks.evaluation.lm_eval_tasks import load_tasks
from tasks.settings.finetune import ScoringSettings
from tests.support.own_tasks import GENERATION_TASK


def test_an_unknown_task_is_named_with_its_neighbours(tasks: Path, tmp_path: Path) -> None:
    settings = ScoringSettings(tasks=("city", "hellaswg"), include_path=tasks)
    with pytest.raises(UserError, match=r"scoring.tasks: hellaswg: no such lm-eval task\. Did you mean .*hellaswag"):
        load_tasks(settings, tmp_path)


def test_a_missing_task_directory_is_an_error(tmp_path: Path) -> None:
    settings = ScoringSettings(tasks=("city",), include_path=tmp_path / "nowhere")
    with pytest.raises(UserError, match="scoring.include_path"):
        load_tasks(settings, tmp_path)


def test_a_task_whose_rows_are_missing_is_an_error(tasks: Path, tmp_path: Path) -> None:
    settings = ScoringSettings(tasks=("city",), include_path=tasks)
    with pytest.raises(UserError, match="scoring.tasks: city: the task's data is not there"):
        load_tasks(settings, tmp_path / "dataset-without-test-rows")


def test_an_unreachable_hub_is_a_temporary_error(
    tasks: Path, tmp_path: Path, no_network: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tasks / "hub.yaml").write_text(
        GENERATION_TASK.replace("task: city", "task: hub").replace("dataset_path: json", "dataset_path: a/b"),
        encoding="utf-8",
    )
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _seconds: None)
    with pytest.raises(TemporaryError, match="scoring.tasks: hub: the Hub cannot be reached"):
        load_tasks(ScoringSettings(tasks=("hub",), include_path=tasks), tmp_path)
    assert no_network


def test_a_relative_task_directory_is_looked_for_in_the_repository(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.evaluation.lm_eval_tasks.REPOSITORY", tasks.parent)
    row = {"prompt": "I live in Oslo. Where?", "completion": "Oslo"}
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    settings = ScoringSettings(tasks=("city",), include_path=Path(tasks.name))
    assert [task.config.task for task in load_tasks(settings, tmp_path)] == ["city"]
