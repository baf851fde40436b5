"""The optimizers of the settings: each trains, each is a row of one table, and a row more is all that another needs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import TrainingArguments

from tasks.analysis.methods import settings_of
from tasks.engine.artifacts import Artifact
from tasks.engine.errors import UserError
from tasks.evaluation.validation_loss import read_rows
from tasks.settings.comparison import ComparedMethod
from tasks.settings.finetune import ADAMW, GritSettings, Optimizer
from tasks.settings.presets import load_settings
from tasks.training.faulty_step import PaddedCollator
from tasks.training.limits import check_machine
from tasks.training.optimizers import OPTIMIZERS, OptimizerKind, make_optimizer
from tasks.training.step import supervised_loss
from tasks.training.trainer import OneDevice
from tests.support.trainings import BASE, LORA, QUICK, Run, fresh_network

OTHERS = [optimizer for optimizer in get_args(Optimizer) if optimizer not in ADAMW]
"""Those that are methods of their own."""


def test_the_setting_and_the_table_name_the_same_optimizers() -> None:
    assert sorted(OPTIMIZERS) == sorted(get_args(Optimizer))
    assert set(ADAMW) < set(OPTIMIZERS)


@pytest.mark.parametrize("optimizer", OTHERS)
def test_other_optimizers_train_and_go_on_from_a_checkpoint_with_the_same_bits(
    tiny_model: Artifact, dataset: Artifact, tmp_path: Path, baseline: Run, optimizer: str
) -> None:
    training = QUICK.model_copy(update={"optimizer": optimizer})
    whole = Run(tmp_path / "whole", tiny_model, dataset, training=training)
    stopped = Run(tmp_path / "stopped", tiny_model, dataset, stop_after=2, training=training)
    assert all(torch.equal(whole.weights[name], stopped.weights[name]) for name in whole.weights)
    assert [step["tokens"] for step in whole.lines("history")] == [s["tokens"] for s in baseline.lines("history")]
    assert whole.lines("history")[0]["loss"] == baseline.lines("history")[0]["loss"]
    assert any(not torch.equal(whole.weights[name], baseline.weights[name]) for name in whole.weights)
    assert whole.facts["validation"][-1][1] < whole.facts["validation"][0][1]
    assert stopped.facts["energy_joules"] is None, "what the first process took is not known"


def test_lora_fa_leaves_a_as_it_is_and_counts_b_alone(
    tiny_model: Artifact, dataset: Artifact, tmp_path: Path, baseline: Run
) -> None:
    run = Run(tmp_path, tiny_model, dataset, training=QUICK.model_copy(update={"optimizer": "lora_fa"}))
    fresh = fresh_network(tiny_model, seed=7).state_dict()
    for name, weight in run.weights.items():
        start = fresh[name.replace(".weight", ".default.weight")].float()
        assert torch.equal(weight, start) == ("lora_A" in name)
    of_b = sum(weight.numel() for name, weight in run.weights.items() if "lora_B" in name)
    assert run.facts["trainable_parameters"] == of_b < baseline.facts["trainable_parameters"]


def test_lora_plus_gives_b_sixteen_times_the_rate_of_a(tiny_model: Artifact) -> None:
    network, lora_plus = fresh_network(tiny_model, seed=7), QUICK.model_copy(update={"optimizer": "lora_plus"})
    optimizer = make_optimizer(network, LORA, lora_plus)
    groups = {group["lr"]: group for group in optimizer.param_groups if group["params"]}
    of_a, of_b = sorted(groups)
    assert of_b / of_a == pytest.approx(16)
    assert math.sqrt(of_a * of_b) == pytest.approx(QUICK.learning_rate)
    assert {group["weight_decay"] for group in groups.values()} == {QUICK.weight_decay}
    b_matrices = {id(weight) for name, weight in network.named_parameters() if "lora_B" in name}
    assert {id(weight) for weight in groups[of_b]["params"]} == b_matrices


@pytest.mark.parametrize("optimizer", [name for name, kind in OPTIMIZERS.items() if not kind.takes_grit])
def test_grit_refuses_optimizers_that_it_cannot_go_before(optimizer: str) -> None:
    with pytest.raises(UserError, match=f"{optimizer} is a method of its own"):
        check_machine(BASE, QUICK.model_copy(update={"optimizer": optimizer}), GritSettings())


def test_a_second_gpu_does_not_double_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers would copy the model to each that is visible."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda arguments: 2))
    arguments = OneDevice(output_dir=str(tmp_path), per_device_train_batch_size=4, bf16=False, use_cpu=True)
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, 4)


class TestAnOptimizerMore:
    """Plain gradient descent, as a row of the table and nothing else."""

    RATE = 0.5
    ONE_STEP = QUICK.model_copy(
        update={
            "optimizer": "made_up", "max_steps": 1, "warmup_steps": 0, "learning_rate": RATE, "eval_steps": None,
            "per_device_batch_size": 16, "max_grad_norm": 1e9,
        }
    )  # fmt: skip

    @pytest.fixture
    @staticmethod
    def row(monkeypatch: pytest.MonkeyPatch) -> None:
        def sgd(network: Any, lora: Any, training: Any) -> torch.optim.Optimizer:
            return torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=training.learning_rate)

        kind = OptimizerKind(sgd, takes_grit=True, moments_obstacle="gradient descent does not have")
        monkeypatch.setitem(OPTIMIZERS, "made_up", kind)

    @pytest.mark.usefixtures("row")
    def test_it_trains(self, tiny_model: Artifact, dataset: Artifact, tmp_path: Path) -> None:
        """All rows in one step, so that the gradient is known: B moves along it, and A, whose gradient is 0, stays."""
        run = Run(tmp_path, tiny_model, dataset, training=self.ONE_STEP)
        network = fresh_network(tiny_model, seed=7)
        batch = PaddedCollator(0, 64)(read_rows(dataset.path / "train.parquet"))
        supervised_loss(network, batch, int((batch["labels"][:, 1:] != -100).sum())).backward()
        start = {name.replace(".default", ""): weight for name, weight in network.named_parameters()}
        assert len(run.weights) == 28
        for name, weight in run.weights.items():
            step = self.RATE * start[name].grad
            assert ("lora_B" in name) == bool(step.abs().max() > 0)
            torch.testing.assert_close(weight, start[name].detach() - step, rtol=1e-4, atol=1e-7)

    @pytest.mark.usefixtures("row")
    def test_grit_goes_before_it_as_far_as_its_row_says(
        self, tiny_model: Artifact, dataset: Artifact, tmp_path: Path
    ) -> None:
        grit = GritSettings(kfac_min_samples=1, basis="initial")
        check_machine(BASE, self.ONE_STEP, grit)
        with pytest.raises(UserError, match="graft acts on Adam's moments, which gradient descent does not have"):
            check_machine(BASE, self.ONE_STEP, GritSettings(variant="graft"))
        with_grit = Run(tmp_path / "with", tiny_model, dataset, training=self.ONE_STEP, grit=grit)
        without = Run(tmp_path / "without", tiny_model, dataset, training=self.ONE_STEP)
        turned = [name for name in without.weights if not torch.equal(with_grit.weights[name], without.weights[name])]
        assert turned and all("lora_B" in name for name in turned)

    @pytest.mark.usefixtures("row")
    def test_it_is_a_method_and_others_do_not_take_it(self) -> None:
        method: ComparedMethod = "made_up"
        demo = load_settings("demo")
        assert settings_of(method, demo).training.optimizer == "made_up"
        shared = demo.model_copy(update={"training": demo.training.model_copy(update={"optimizer": "made_up"})})
        assert settings_of("grit", shared).training.optimizer == "adamw_torch"
