"""What a comparison does where a part of it fails: stand-ins for the trainings, the real order of the stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows import comparison_stages
from flows.finetune import Tuned
from tasks.engine.artifacts import Artifact
from tasks.engine.errors import TemporaryError, TrainingError, UserError
from tasks.settings.comparison import CompareSettings
from tasks.settings.finetune import FinetuneSettings
from tasks.settings.presets import load_settings
from tasks.train import Training
from tests.support.made_up_comparison import MadeUp

KILLED = TemporaryError("the training process was ended by SIGKILL")
DIVERGED = TrainingError("training diverged", where="training.learning_rate", fix="Lower it.")
FULL = UserError("no space is left", where="store", fix="Free some.")


class Stages:
    """The stages of a comparison, none of which trains.

    Args:
        directory: where outputs are made up.
        patch: undone after the test.
    """

    def __init__(self, directory: Path, patch: pytest.MonkeyPatch) -> None:
        self.outputs = MadeUp(directory)
        self.failures: dict[str, BaseException] = {}
        """What is raised in place of a `trial`, a `branch` or the `fault`, the first two by `optimizer part`."""
        self.done: list[str] = []
        self.settings: list[FinetuneSettings] = []
        """With which something was trained, and written into the report."""
        self.runs: Any = None
        self.faults: Any = None
        self.not_run: dict[str, str] = {}
        base = self.outputs.base
        patch.setattr(comparison_stages, "prepared", lambda *_: (self.outputs.model, self.outputs.dataset, base.scores))
        self.figures = {"answers": base.answers, "forgetting": base.forgetting}
        patch.setattr(comparison_stages, "evaluated", lambda *_: self.figures)
        for name in ("trained", "branch", "reproduce_fault", "write_comparison"):
            patch.setattr(comparison_stages, name, getattr(self, f"_{name}"))

    def go(self, *methods: str, overrides: dict[str, Any] | None = None, **comparison: Any) -> None:
        """Compare methods with two seeds."""
        wanted = CompareSettings.model_validate({"methods": methods, "seeds": 2} | comparison)
        comparison_stages.stages(load_settings("demo", overrides or {}), wanted)

    def _trained(self, settings: FinetuneSettings, model: Artifact, dataset: Artifact, seed: int) -> Training:
        self._do(f"{settings.training.optimizer} trial")
        self.settings.append(settings)
        run = self.outputs.run("trial", seed, settings.training.learning_rate)
        return Training(adapter=run.adapter, history=run.history)

    def _branch(self, settings: FinetuneSettings, model: Artifact, inputs: Any, seed: int) -> Any:
        self._do(f"{settings.training.optimizer} branch")
        self.settings.append(settings)
        run = self.outputs.run(settings.method, seed, 0.0)
        return Tuned(run.adapter, run.history, model, run.scores, run.gguf), self.figures

    def _reproduce_fault(self, *_: Any, **__: Any) -> Artifact:
        self._do("fault")
        return self.outputs.history(0.0, 1)

    def _write_comparison(self, settings: FinetuneSettings, **arguments: Any) -> None:
        self.runs, self.faults, self.not_run = (arguments[name] for name in ("runs", "faults", "not_run"))
        self.settings.append(settings)

    def _do(self, what: str) -> None:
        self.done.append(what)
        if what in self.failures:
            raise self.failures[what]


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stages:
    return Stages(tmp_path / "made-up", monkeypatch)


@pytest.mark.parametrize(
    ("asked", "tokens"),
    [
        ({"training.eval_tokens": None}, 1920),  # a tenth of 80 steps of 8 rows of 100 tokens, three in ten supervised
        ({"training.eval_tokens": None, "training.batching": "packed", "training.max_steps": 10}, 4915),
        ({"training.eval_tokens": 7}, 7),
        ({"training.eval_tokens": None, "training.eval_steps": 9}, None),
    ],
)
def test_all_are_validated_at_the_same_tokens_unless_steps_were_asked_for(
    stages: Stages, asked: dict[str, Any], tokens: int | None
) -> None:
    stages.go("baseline", "grit", overrides=asked, learning_rates=(1e-3, 2e-3))
    assert len(stages.settings) == 4 + 4 + 1
    assert {settings.training.eval_tokens for settings in stages.settings} == {tokens}
    assert {settings.training.eval_steps for settings in stages.settings} == {asked.get("training.eval_steps")}


@pytest.mark.parametrize("failure", [KILLED, DIVERGED])
def test_a_method_whose_trainings_fail_is_left_out_with_the_reason(stages: Stages, failure: Exception) -> None:
    stages.failures["lora_fa branch"] = failure
    stages.go("baseline", "lora_fa", "riemannian")
    assert [run.method for run in stages.runs] == ["baseline", "riemannian"] * 2
    assert stages.not_run == {"lora_fa": f"seed 3407: {failure}"}
    assert stages.done.count("lora_fa branch") == 1


def test_a_method_whose_trials_are_killed_is_left_out_and_one_whose_trials_diverge_is_not(stages: Stages) -> None:
    """A kill says nothing of the rate, and a choice among fewer rates would be another budget."""
    stages.failures |= {"lora_fa trial": KILLED, "riemannian trial": DIVERGED}
    stages.go("baseline", "lora_fa", "riemannian", learning_rates=(1e-3, 2e-3))
    assert [run.method for run in stages.runs] == ["baseline", "riemannian"] * 2
    assert stages.not_run == {"lora_fa": str(KILLED)}


@pytest.mark.parametrize("part", ["trial", "branch"])
@pytest.mark.parametrize("failure", [KILLED, FULL, KeyboardInterrupt()])
def test_there_is_no_comparison_without_the_first_method(stages: Stages, part: str, failure: BaseException) -> None:
    stages.failures[f"adamw_torch {part}"] = failure
    with pytest.raises(type(failure)):
        stages.go("baseline", "lora_fa", learning_rates=(1e-3,))


@pytest.mark.parametrize("failure", [FULL, KeyboardInterrupt()])
@pytest.mark.parametrize("what", ["lora_fa branch", "fault"])
def test_a_full_disk_and_ctrl_c_end_the_comparison(stages: Stages, what: str, failure: BaseException) -> None:
    stages.failures[what] = failure
    with pytest.raises(type(failure)):
        stages.go("baseline", "lora_fa", "study-fault")
    assert stages.runs is None


@pytest.mark.parametrize("failure", [KILLED, DIVERGED])
def test_the_fault_comes_last_and_its_failure_costs_nothing_else(stages: Stages, failure: Exception) -> None:
    stages.failures["fault"] = failure
    stages.go("baseline", "study-fault", "lora_fa")
    assert stages.done == ["adamw_torch branch", "lora_fa branch"] * 2 + ["fault"]
    assert len(stages.runs) == 4
    assert stages.faults == () and stages.not_run == {"study-fault": str(failure)}
    stages.failures.clear()
    stages.go("baseline", "study-fault")
    assert [fault.seed for fault in stages.faults] == [3407] and stages.not_run == {}
