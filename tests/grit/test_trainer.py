from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback

from grit import GritCallback, GRITConfig, GRITManager, GritTrainer
from grit.modules import lora_modules
from tests.support.adapters import arguments, network


class Seen(TrainerCallback):
    """Gradient norms as they reach the optimizer, and as the trainer reports them before clipping."""

    def __init__(self) -> None:
        self.applied: list[float] = []
        self.reported: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        self.applied.append(float(torch.cat(gradients).norm()))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "grad_norm" in logs:
            self.reported.append(logs["grad_norm"])


def test_clipping_applies_to_the_preconditioned_gradient(
    word_tokenizer: PreTrainedTokenizerFast, rows: Dataset, tmp_path: Path
) -> None:
    """Without norm matching K-FAC's step is far longer than the gradient; what reaches the optimizer is clipped."""
    model, seen = network(len(word_tokenizer)), Seen()
    manager = GRITManager(
        model, GRITConfig(power=1.0, norm_match=False, kfac_update_freq=1, cov_update_freq=1, kfac_min_samples=1)
    )
    trainer = GritTrainer(
        model=model, grit_manager=manager, args=arguments(tmp_path, max_grad_norm=0.25), train_dataset=rows,
        processing_class=word_tokenizer, callbacks=[seen],
    )  # fmt: skip
    trainer.train()
    assert max(seen.reported) > 10 * trainer.step_statistics["grad_norm"]
    assert max(seen.applied) == pytest.approx(0.25, rel=1e-3)
    assert seen.reported[-1] == pytest.approx(trainer.step_statistics["grad_norm_preconditioned"], rel=1e-4)


def test_no_clipping_at_all_is_refused(word_tokenizer: PreTrainedTokenizerFast, rows: Dataset, tmp_path: Path) -> None:
    model = network(len(word_tokenizer))
    with pytest.raises(ValueError, match="max_grad_norm must be above 0"):
        GritTrainer(
            model=model, grit_manager=GRITManager(model), args=arguments(tmp_path, max_grad_norm=0.0),
            train_dataset=rows, processing_class=word_tokenizer,
        )  # fmt: skip


def test_under_float16_clipping_comes_after_unscaling_and_an_overflow_is_left_to_the_scaler(
    word_tokenizer: PreTrainedTokenizerFast, rows: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a scaler on the CPU, where Transformers makes none: the step, its figures and its factors as without one."""
    steps: list[tuple[list[Tensor], dict[str, float], Tensor]] = []
    for scale in (None, 2.0**12):
        model = network(len(word_tokenizer))
        config = GRITConfig(kfac_update_freq=1, cov_update_freq=1, kfac_min_samples=1)
        trainer = GritTrainer(
            model=model, grit_manager=GRITManager(model, config), args=arguments(tmp_path, max_grad_norm=1e-3),
            train_dataset=rows, processing_class=word_tokenizer,
        )  # fmt: skip
        accelerator = trainer.accelerator
        if scale:
            monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")
            accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=scale)
        weights = [p for p in model.parameters() if p.requires_grad]
        optimizer = accelerator.prepare(torch.optim.AdamW(weights, lr=1e-2))
        inputs = next(iter(trainer.get_train_dataloader()))
        trainer.current_gradient_accumulation_steps = 1
        trainer.training_step(model, inputs, torch.tensor(6))
        trainer._clip_grad_norm(model)
        clipped = torch.cat([p.grad.flatten() for p in weights if p.grad is not None]).norm()
        assert float(clipped) == pytest.approx(1e-3, rel=1e-3) and trainer.step_statistics["grad_norm"] > 2e-3
        optimizer.step()
        sigma = trainer.grit_manager.factor_groups[0].sigma_u
        steps.append(([p.detach().clone() for p in weights], dict(trainer.step_statistics), sigma))
    for name, value in steps[0][1].items():
        assert steps[1][1][name] == pytest.approx(value, rel=1e-3)
    torch.testing.assert_close(steps[1][2], steps[0][2], rtol=1e-3, atol=0)
    for plain, scaled in zip(steps[0][0], steps[1][0], strict=True):
        torch.testing.assert_close(scaled, plain, rtol=1e-3, atol=1e-4)

    optimizer.zero_grad()
    trainer.training_step(model, inputs, torch.tensor(6))
    overflowed = weights[1].grad
    assert overflowed is not None
    overflowed[0, 0] = float("inf")
    trainer._clip_grad_norm(model)
    assert not bool(torch.isfinite(overflowed).all())
    optimizer.step()
    assert optimizer.step_was_skipped and accelerator.scaler.get_scale() == 2.0**11
    assert all(torch.equal(before, weight) for before, weight in zip(steps[1][0], weights, strict=True))


def test_in_a_bare_loop_the_scaler_has_unscaled_before_the_optimizers_hook(rows: Dataset) -> None:
    figures, factors = [], []
    for scale in (None, 2.0**12):
        model = network(97)
        manager = GRITManager(model, GRITConfig(kfac_update_freq=1, cov_update_freq=1, kfac_min_samples=1))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        optimizer.register_step_pre_hook(lambda *_, manager=manager: manager.step())
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for row in rows.select(range(3)):
            manager.loss_scale, manager.loss_denominator = scaler.get_scale(), 3
            ids = torch.tensor([row["input_ids"]])
            scaler.scale(model(input_ids=ids, labels=ids).loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        figures.append(manager.last_diagnostics)
        factors.append(manager.factor_groups[0].sigma_u)
    assert figures[1] == pytest.approx(figures[0], rel=1e-3)
    torch.testing.assert_close(factors[1], factors[0], rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("setting", ["torch_compile", "_n_gpu", "fsdp", "deepspeed"])
def test_what_hides_gradients_or_tokens_is_refused_by_name(
    word_tokenizer: PreTrainedTokenizerFast,
    rows: Dataset,
    tmp_path: Path,
    setting: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """TRL itself refuses DataParallel for a trainer. FSDP needs several processes; here it is only said to be on."""
    named = {"torch_compile": "torch_compile", "_n_gpu": "DataParallel", "fsdp": "FSDP", "deepspeed": "DeepSpeed"}
    model, settings = network(len(word_tokenizer)), arguments(tmp_path)
    make_accelerator = Trainer.create_accelerator_and_postprocess

    def with_fsdp(trainer: Trainer) -> None:
        make_accelerator(trainer)
        trainer.is_fsdp_enabled = True

    if setting == "fsdp":
        monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", with_fsdp)
    else:
        setattr(settings, setting, 2 if setting == "_n_gpu" else True)
    with pytest.raises(ValueError, match=f"(GRIT|GritTrainer) does not .*{named[setting]}"):
        GritTrainer(
            model=model, grit_manager=GRITManager(model), args=settings, train_dataset=rows,
            processing_class=word_tokenizer,
        )  # fmt: skip
    optimizer, settings.fsdp = torch.optim.AdamW(model.parameters()), "full_shard" if setting == "fsdp" else None
    with pytest.raises(ValueError, match=f"GRIT does not handle {named[setting]}"):
        GritCallback(GRITManager(model)).on_train_begin(settings, None, None, optimizer=optimizer, model=model)


def test_trls_figures_do_not_count_the_passes_for_the_basis_and_a_second_training_goes_on(
    word_tokenizer: PreTrainedTokenizerFast, rows: Dataset, tmp_path: Path
) -> None:
    counted = []
    for basis in ("initial", "gradient"):
        model = network(len(word_tokenizer))
        manager = GRITManager(model, GRITConfig(basis=basis, kfac_min_samples=1))
        trainer = GritTrainer(
            model=model, grit_manager=manager, args=arguments(tmp_path, max_steps=2, learning_rate=1e-9),
            train_dataset=rows, processing_class=word_tokenizer,
        )  # fmt: skip
        trainer.train()
        lines = [line for line in trainer.state.log_history if "loss" in line]
        counted.append([[line[name] for name in ("num_tokens", "mean_token_accuracy", "entropy")] for line in lines])
    assert [line[0] for line in counted[1]] == [8, 16]
    for without_basis, with_basis in zip(*counted, strict=True):
        assert with_basis == pytest.approx(without_basis, rel=1e-4)
    basis_seconds, a = manager.basis_seconds, lora_modules(model)[0].lora_a.weight.detach().clone()
    trainer.train()
    assert manager.steps == 4 and manager.basis_seconds == basis_seconds
    torch.testing.assert_close(lora_modules(model)[0].lora_a.weight, a, rtol=0, atol=1e-6)
