"""PEFT's optimizers as methods, figures of each module, energy, and the study's fault."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from grit.config import GRITConfig
from grit.manager import GRITManager
from tasks.analysis.methods import fault_settings
from tasks.comparison.reproduce_fault import reproduce_fault
from tasks.engine.artifacts import Artifact, Store
from tasks.engine.errors import UserError
from tasks.settings.finetune import GritSettings
from tasks.training import run as training_run
from tasks.training.energy import EnergyMeter
from tasks.training.faulty_step import PaddedCollator
from tasks.training.grit_modules import effective_rank, gradients, module_figures
from tasks.training.job import Job
from tasks.training.limits import check_machine
from tasks.training.network import load_network
from tasks.training.optimizers import PEFT_OPTIMIZERS
from tasks.training.run import Training
from tests.support.trainings import BASE, LORA, QUICK, Run


@pytest.fixture(scope="module")
def dataset(tokenized_rows: Callable[[int, int], Artifact]) -> Artifact:
    return tokenized_rows(16, 4)


@pytest.fixture(scope="module")
def baseline(tiny_model: Artifact, dataset: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("baseline"), tiny_model, dataset)


@pytest.mark.parametrize("optimizer", PEFT_OPTIMIZERS)
def test_pefts_optimizers_train_and_go_on_from_a_checkpoint_with_the_same_bits(
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
    made = Run(tmp_path, tiny_model, dataset, training=QUICK.model_copy(update={"optimizer": "lora_fa"}))
    fresh = load_network(tiny_model, BASE, LORA, QUICK, 64, seed=7).state_dict()
    for name, weight in made.weights.items():
        start = fresh[name.replace(".weight", ".default.weight")].float()
        assert torch.equal(weight, start) == ("lora_A" in name)
    of_b = sum(weight.numel() for name, weight in made.weights.items() if "lora_B" in name)
    assert made.facts["trainable_parameters"] == of_b < baseline.facts["trainable_parameters"]


def test_a_second_gpu_does_not_double_the_batch(baseline: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers would copy the model to each that is visible."""
    arguments = baseline.training.recorder.trainer.args
    monkeypatch.setattr(arguments, "_n_gpu", 2)
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, QUICK.per_device_batch_size)


def test_lora_plus_gives_b_sixteen_times_the_rate_of_a(tiny_model: Artifact, dataset: Artifact, tmp_path: Path) -> None:
    made = Run(tmp_path, tiny_model, dataset, training=QUICK.model_copy(update={"optimizer": "lora_plus"}))
    groups = [g for g in made.training.recorder.trainer.optimizer.param_groups if g["params"]]
    rates = sorted(group["initial_lr"] for group in groups)
    assert rates[1] / rates[0] == pytest.approx(16)
    assert math.sqrt(rates[0] * rates[1]) == pytest.approx(QUICK.learning_rate)
    assert {group["weight_decay"] for group in groups} == {QUICK.weight_decay}


@pytest.mark.parametrize("optimizer", PEFT_OPTIMIZERS)
def test_grit_refuses_pefts_optimizers(optimizer: str) -> None:
    with pytest.raises(UserError, match=f"{optimizer} is a method of its own"):
        check_machine(BASE, QUICK.model_copy(update={"optimizer": optimizer}), GritSettings())


def test_the_peak_of_memory_is_that_of_all_processes_of_a_training(
    tiny_model: Artifact, dataset: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_the_first = iter([9 * 10**15, 9 * 10**15])  # at its checkpoint, and at its end
    monkeypatch.setattr("tasks.training.peak_memory._peak_bytes", lambda kind: next(of_the_first, 10))
    assert Run(tmp_path, tiny_model, dataset, stop_after=2).facts["peak_memory_bytes"] == 9 * 10**15
    assert next(of_the_first, None) is None


def test_grit_records_each_module_at_the_validations(tiny_model: Artifact, dataset: Artifact, tmp_path: Path) -> None:
    grit = GritSettings(kfac_min_samples=1, kfac_update_freq=1, cov_update_freq=1)
    whole = Run(tmp_path / "whole", tiny_model, dataset, grit=grit)
    stopped = Run(tmp_path / "stopped", tiny_model, dataset, grit=grit, stop_after=3)
    figures = whole.lines("modules")
    assert figures == stopped.lines("modules")
    assert [line["step"] for line in figures] == [2] * 14 + [4] * 14
    assert figures[0]["module"] == "model.layers.0.self_attn.q_proj"
    assert all(-1 < line["cosine"] < 0.99999 for line in figures)
    late = [line for line in figures if line["step"] == 4]  # the rate of the first step is 0, and so is B until then
    assert all(0.999 <= line[f"effective_rank_{side}"] <= LORA.r + 1e-3 for line in late for side in "hu")


def test_figures_of_a_module_equal_those_by_hand(tiny_model: Artifact) -> None:
    network = load_network(tiny_model, BASE, LORA, QUICK, 64, seed=1)
    manager = GRITManager(network, GRITConfig(basis="initial", kfac_min_samples=1))
    ids = torch.randint(20, 2000, (3, 24), generator=torch.Generator().manual_seed(3))
    for parameter in network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    network(input_ids=ids, labels=ids).loss.backward()
    raw = gradients(manager)
    manager.step()
    figures = module_figures(manager, raw)
    dot = norm_raw = norm_new = 0.0
    for module, line, before in zip(manager.modules, figures, raw, strict=True):
        after = torch.cat([module.lora_a.weight.grad.flatten(), module.lora_b.weight.grad.flatten()])
        dot, norm_raw, norm_new = (
            dot + float(before @ after),
            norm_raw + float(before @ before),
            norm_new + float(after @ after),
        )
        assert line["cosine"] == pytest.approx(float(before @ after / before.norm() / after.norm()), rel=1e-4)
    assert dot / math.sqrt(norm_raw * norm_new) == pytest.approx(manager.last_diagnostics["cosine"], rel=1e-4)


def test_effective_rank_counts_directions() -> None:
    matrices = torch.stack([torch.eye(4), torch.diag(torch.tensor([5.0, 0, 0, 0])), torch.zeros(4, 4)])
    assert effective_rank(matrices).tolist() == pytest.approx([4, 1, 0])
    assert float(effective_rank(torch.diag(torch.tensor([1.0, 1, 0, 0]))[None])) == pytest.approx(2)


def test_energy_adds_up_over_packages_and_over_the_counters_end(tmp_path: Path) -> None:
    def counter(zone: str, value: int) -> None:
        (tmp_path / zone).mkdir(exist_ok=True)
        (tmp_path / zone / "energy_uj").write_text(f"{value}\n")
        (tmp_path / zone / "max_energy_range_uj").write_text("9999999\n")

    counter("intel-rapl:0", 9_000_000)
    counter("intel-rapl:1", 100)
    counter("intel-rapl:0:0", 0)
    counter("intel-rapl-mmio:0", 0)
    meter = EnergyMeter(tmp_path)
    counter("intel-rapl:0", 1_000_000)
    counter("intel-rapl:1", 500_100)
    counter("intel-rapl:0:0", 7_000_000)
    assert meter.read() == pytest.approx(2.0 + 0.5)
    counter("intel-rapl:1", 1_500_100)
    assert meter.read() == pytest.approx(3.5)
    (tmp_path / "intel-rapl:1/energy_uj").unlink()
    assert meter.read() is None
    assert EnergyMeter(tmp_path / "nothing").read() is None


class TestFault:
    @pytest.fixture(scope="class")
    @staticmethod
    def fault(tiny_model: Artifact, dataset: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
        store = Store(tmp_path_factory.mktemp("fault"))
        with pytest.MonkeyPatch.context() as patch:  # without the child process, which test_process is about
            patch.setattr(
                "tasks.comparison.reproduce_fault.train_in_child", lambda job, show: Training(job, show).run()
            )
            return reproduce_fault.function(
                tiny_model,
                dataset,
                base=BASE,
                lora=LORA,
                training=QUICK,
                grit=fault_settings(QUICK),
                seed=7,
                store=store,
            )

    def test_it_leaves_a_history_and_nothing_to_merge(self, fault: Artifact) -> None:
        assert fault.kind == "history"
        assert fault.facts["method"] == "study-fault"
        assert not [name for name in fault.files if name.endswith(".safetensors")]
        assert not list(fault.path.parent.parent.glob("adapter*"))

    def test_it_trains_by_adamw_with_transformers_whatever_the_comparison_does(
        self, tiny_model: Artifact, dataset: Artifact, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        jobs: list[Job] = []

        def train(job: Job, show: Any) -> dict[str, Any]:
            jobs.append(job)
            return {}

        monkeypatch.setattr("tasks.comparison.reproduce_fault.train_in_child", train)
        other = QUICK.model_copy(update={"backend": "unsloth", "optimizer": "lora_fa", "batching": "packed"})
        reproduce_fault.function(
            tiny_model, dataset, base=BASE, lora=LORA, training=other, grit=fault_settings(other), seed=7, store=store
        )
        assert jobs[0].training == QUICK

    def test_no_gradient_is_preconditioned(self, fault: Artifact) -> None:
        lines = [json.loads(line) for line in (fault.path / "history.jsonl").read_text().splitlines()]
        assert all(line["grit"]["cosine"] == pytest.approx(1) for line in lines)

    def test_both_losses_are_those_of_one_forward_pass(
        self, tiny_model: Artifact, dataset: Artifact, baseline: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of the first step, before anything was learned, by hand; the honest one equals the baseline's."""
        seen = []

        class Collator(PaddedCollator):
            def __call__(self, rows: Any) -> dict[str, torch.Tensor]:
                seen.append(super().__call__(rows))
                return dict(seen[-1])

        monkeypatch.setattr(training_run, "PaddedCollator", Collator)
        never = GritSettings(variant="published", basis="initial", ng_warmup_steps=4, kfac_min_samples=1)
        two_passes = QUICK.model_copy(update={"per_device_batch_size": 2, "gradient_accumulation_steps": 2})
        run = Run(tmp_path, tiny_model, dataset, grit=never, fault=True, training=two_passes)
        first, honest = run.lines("history")[0], baseline.lines("history")[0]
        assert first["loss"] == pytest.approx(honest["loss"], rel=1e-5)
        assert first["supervised_tokens"] == honest["supervised_tokens"]
        network = load_network(tiny_model, BASE, LORA, QUICK, 64, seed=7)
        parts = []
        for batch in seen[:2]:
            with torch.no_grad():
                logits = network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            targets = batch["input_ids"][:, 1:].flatten()
            parts.append(float(functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets)))
        assert first["faulty_loss"] == pytest.approx(sum(parts) / 2, rel=1e-4)


def test_the_padded_batch_holds_rows_masks_and_labels() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [-100]}]
    batch = PaddedCollator(0, 4)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [8, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100], [-100] * 4]
