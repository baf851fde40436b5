from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig

from grit import GRITConfig, GRITManager, GritTrainer


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


def network(vocabulary: int, **lora: Any) -> PeftModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **lora))


def arguments(directory: Path, **changes: Any) -> SFTConfig:
    settings = {
        "max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-2,
        "save_strategy": "no", **changes,
    }  # fmt: skip
    return SFTConfig(str(directory), use_cpu=True, bf16=False, report_to="none", max_length=None, **settings)


def test_clipping_applies_to_the_preconditioned_gradient(
    smollm2_tokenizer: PreTrainedTokenizerFast, rows: Dataset, tmp_path: Path
) -> None:
    """Without norm matching K-FAC's step is far longer than the gradient; what reaches the optimizer is clipped."""
    model, seen = network(len(smollm2_tokenizer)), Seen()
    manager = GRITManager(
        model, GRITConfig(power=1.0, norm_match=False, kfac_update_freq=1, cov_update_freq=1, kfac_min_samples=1)
    )
    trainer = GritTrainer(
        model=model, grit_manager=manager, args=arguments(tmp_path, max_grad_norm=0.25), train_dataset=rows,
        processing_class=smollm2_tokenizer, callbacks=[seen],
    )  # fmt: skip
    trainer.train()
    assert max(seen.reported) > 10 * trainer.step_statistics["grad_norm"]
    assert max(seen.applied) == pytest.approx(0.25, rel=1e-3)
    assert seen.reported[-1] == pytest.approx(trainer.step_statistics["grad_norm_preconditioned"], rel=1e-4)


def test_no_clipping_at_all_is_refused(
    smollm2_tokenizer: PreTrainedTokenizerFast, rows: Dataset, tmp_path: Path
) -> None:
    model = network(len(smollm2_tokenizer))
    with pytest.raises(ValueError, match="max_grad_norm must be above 0"):
        GritTrainer(
            model=model, grit_manager=GRITManager(model), args=arguments(tmp_path, max_grad_norm=0.0),
            train_dataset=rows, processing_class=smollm2_tokenizer,
        )  # fmt: skip
