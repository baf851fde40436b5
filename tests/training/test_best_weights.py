"""Keeping the adapter of the lowest validation loss, and stopping early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import TrainerControl, TrainerState, TrainingArguments

from tasks.engine.artifacts import Artifact
from tasks.settings.finetune import GritSettings, TrainingSettings
from tasks.training.best_weights import BestWeights
from tests.support.trainings import QUICK, Run

STEEP = QUICK.model_copy(
    update={"max_steps": 8, "learning_rate": 0.01, "lr_scheduler": "constant_with_warmup", "eval_steps": 1}
)
"""The validation loss falls, and then rises; the schedule does not depend on the number of steps."""
GRIT = GritSettings(kfac_update_freq=1, kfac_min_samples=1, basis="initial")


def same(run: Run, other: Run) -> bool:
    return all(torch.equal(run.weights[name], other.weights[name]) for name in run.weights)


@pytest.mark.parametrize("grit", [None, GRIT], ids=["baseline", "grit"])
def test_the_adapter_is_that_of_the_lowest_loss(
    tiny_model: Artifact, dataset: Artifact, tmp_path: Path, grit: GritSettings | None
) -> None:
    def trained(name: str, stop_after: int | None = None, **changes: Any) -> Run:
        training = STEEP.model_copy(update=changes)
        return Run(tmp_path / name, tiny_model, dataset, stop_after, training=training, grit=grit)

    last, best = trained("last"), trained("best", keep_best=True)
    losses = dict(last.facts["validation"])
    assert best.facts["validation"] == last.facts["validation"], "keeping changes no training"
    step, loss = best.facts["kept"]
    assert 1 < step < 8 and loss == losses[step] == min(losses[number] for number in losses if number)
    assert last.facts["kept"] is None and not last.facts["stopped_early"] and not same(last, best)
    assert same(best, trained("short", max_steps=step)), "as if training had ended there"

    patient = trained("patient", keep_best=True, early_stopping_patience=2)
    assert patient.facts["stopped_early"] and patient.facts["steps"] == step + 2 < 8
    assert patient.facts["kept"] == [step, loss] and same(patient, best)
    assert same(trained("stopped", early_stopping_patience=2), trained("until there", max_steps=step + 2))
    for killed_after in (1, step + 1):
        resumed = trained(f"killed {killed_after}", killed_after, keep_best=True, early_stopping_patience=2)
        assert same(resumed, best) and resumed.facts["kept"] == [step, loss]
        assert resumed.facts["stopped_early"] and resumed.facts["steps"] == step + 2


class Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.frozen = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1), False)


def train(losses: list[float], patience: int | None, tmp_path: Path, resume: bool = False) -> tuple[float, int]:
    """The weight that is kept, and the step at which training stops; the weight equals the step's number."""
    network: Any = Network()
    validation: list[tuple[int, float]] = [(0, 0.0)]
    kept = BestWeights(network, validation, keep=True, patience=patience)
    state, arguments = TrainerState(max_steps=len(losses)), TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    for step, loss in enumerate(losses, start=1):
        state.global_step = step
        network.weight.data.fill_(step)
        validation.append((step, loss))
        control = kept.on_log(arguments, state, TrainerControl())
        kept.on_log(arguments, state, TrainerControl())  # the closing summary brings no new validation
        if control.should_training_stop:
            break
        if resume:
            kept.save(tmp_path)
            kept = BestWeights(network, validation, keep=True, patience=patience)
            kept.go_on_from(tmp_path)
    kept.restore()
    assert network.frozen.item() == 0
    return network.weight.item(), state.global_step


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    ("losses", "patience", "expected"),
    [
        ([3, 2, 1, 2, 3, 4], None, (3, 6)),
        ([3, 2, 1, 2, 3, 4], 2, (3, 5)),
        ([3, 2, 1, 2, 0.5, 4], 2, (5, 6)),  # one worse validation is forgiven
        ([1, 1, 1, 1], 3, (1, 4)),  # equal is no better
        ([5, 6, 7], 1, (1, 2)),  # the untrained model's loss of 0 is no candidate
    ],
)
def test_the_rule(
    losses: list[float], patience: int | None, expected: tuple[float, int], resume: bool, tmp_path: Path
) -> None:
    assert train(losses, patience, tmp_path, resume) == expected


@pytest.mark.parametrize("choice", [{"keep_best": True}, {"early_stopping_patience": 1}])
def test_without_validations_there_is_nothing_to_choose_by(choice: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="need eval_tokens, or eval_steps"):
        TrainingSettings(**choice)
    with pytest.raises(ValidationError, match="eval_steps below max_steps \\(20\\)"):
        TrainingSettings(max_steps=20, eval_steps=20, **choice)
    TrainingSettings(max_steps=20, eval_steps=19, **choice)
