"""Peak memory and energy of a training, figures of each module, and the study's fault."""

from __future__ import annotations

import json
import math
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
from tasks.settings.finetune import GritSettings
from tasks.training import trainer
from tasks.training.energy import EnergyMeter
from tasks.training.faulty_step import PaddedCollator
from tasks.training.grit_modules import effective_rank, gradients, module_figures
from tasks.training.job import Job
from tasks.training.run import Training
from tests.support.trainings import BASE, LORA, QUICK, Run, fresh_network


def test_the_peak_of_memory_is_that_of_all_processes_of_a_training(
    tiny_model: Artifact, dataset: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_the_first = iter([9 * 10**15, 9 * 10**15])  # at its checkpoint, and at its end
    monkeypatch.setattr("tasks.training.peak_memory.peak_bytes", lambda kind: next(of_the_first, 10))
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
    network = fresh_network(tiny_model, seed=1)
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

        monkeypatch.setattr(trainer, "PaddedCollator", Collator)
        never = GritSettings(variant="published", basis="initial", ng_warmup_steps=4, kfac_min_samples=1)
        two_passes = QUICK.model_copy(update={"per_device_batch_size": 2, "gradient_accumulation_steps": 2})
        run = Run(tmp_path, tiny_model, dataset, grit=never, fault=True, training=two_passes)
        first, honest = run.lines("history")[0], baseline.lines("history")[0]
        assert first["loss"] == pytest.approx(honest["loss"], rel=1e-5)
        assert first["supervised_tokens"] == honest["supervised_tokens"]
        network = fresh_network(tiny_model, seed=7)
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
