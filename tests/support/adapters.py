"""Small Llamas with LoRA, and how GRIT's tests train them: by a bare loop, or by a trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from grit import GritCallback, GRITConfig, GRITManager, GritTrainer

MakeModel = Callable[..., PeftModel]
"""What the fixture `make_model` gives."""
QUICK = GRITConfig(kfac_update_freq=1, cov_update_freq=1, kfac_min_samples=1)
"""Captured and factorised in every step."""
OFTEN = {"kfac_update_freq": 2, "cov_update_freq": 1, "kfac_min_samples": 1}
"""Options by which more is captured than factorised."""


def backward(model: PeftModel, batch: dict[str, Tensor], denominator: float, scale: float = 1.0) -> None:
    """Backward of the summed loss over the supervised tokens, scaled."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    (scale * nll / denominator).backward()


def train(
    model: PeftModel, batch: dict[str, Tensor], manager: GRITManager | None, steps: int, weight_decay: float = 0.01
) -> torch.optim.AdamW:
    """A bare PyTorch loop; returns the optimizer, with its moments."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=weight_decay)
    if manager is not None:
        manager.loss_denominator = 10
        manager.attach(optimizer)
        optimizer.register_step_pre_hook(lambda *_: manager.step())
    for _ in range(steps):
        backward(model, batch, 10)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def network(vocabulary: int, **lora: Any) -> PeftModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **lora))


def eight_rows() -> Dataset:
    """Of one length; the first token of each is unsupervised."""
    ids = [[10 + i, 20 + i, 30 + i, 40 + i] for i in range(8)]
    return Dataset.from_dict({"input_ids": ids, "labels": [[-100, *row[1:]] for row in ids]})


def arguments(directory: Path, **changes: Any) -> SFTConfig:
    settings = {
        "max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-2,
        "save_strategy": "no", **changes,
    }  # fmt: skip
    return SFTConfig(str(directory), use_cpu=True, bf16=False, report_to="none", max_length=None, **settings)


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def trained(
    kind: str, tokenizer: PreTrainedTokenizerFast, rows: Dataset, directory: Path, config: GRITConfig, **changes: Any
) -> dict[str, Tensor]:
    """Adapter weights, and averages of the factors, after some steps.

    With `GritTrainer`, with TRL's trainer and a callback, or with Transformers' and one.
    """
    model = network(len(tokenizer))
    settings = arguments(directory, max_steps=5, gradient_accumulation_steps=2, **changes)
    manager = GRITManager(model, config)
    if kind == "GritTrainer":
        trainer: Trainer = GritTrainer(
            model=model, grit_manager=manager, args=settings, train_dataset=rows, processing_class=tokenizer
        )
    elif kind == "SFTTrainer":
        trainer = SFTTrainer(
            model=model, args=settings, train_dataset=rows, processing_class=tokenizer,
            callbacks=[GritCallback(manager)],
        )  # fmt: skip
    else:
        names = ("max_steps", "gradient_accumulation_steps", "per_device_train_batch_size", "learning_rate")
        plain = TrainingArguments(
            str(directory), use_cpu=True, report_to="none", save_strategy="no", bf16=False, lr_scheduler_type="linear",
            **{name: getattr(settings, name) for name in names},
        )  # fmt: skip
        collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
        trainer = Trainer(model, plain, collator, rows, callbacks=[GritCallback(manager)])
    trainer.train()
    assert manager.steps == 5
    manager.close()
    averages = {name: value for name, value in manager.state_dict().items() if "mean" in name}
    return weights(model) | averages


def resumable(
    tokenizer: PreTrainedTokenizerFast,
    rows: Dataset,
    directory: Path,
    kind: str,
    variant: str,
    callbacks: Sequence[TrainerCallback] = (),
    **changes: Any,
) -> tuple[SFTTrainer, GRITManager]:
    """Eight steps with dropout, a checkpoint after every third."""
    model = network(len(tokenizer), lora_dropout=0.1)
    reprojection = 2 if variant == "kfac" else 0
    config = GRITConfig(variant=variant, reprojection_freq=reprojection, **{**OFTEN, "kfac_update_freq": 5})
    manager = GRITManager(model, config)
    shared: dict[str, Any] = {
        "model": model, "train_dataset": rows, "processing_class": tokenizer,
        "args": arguments(directory, max_steps=8, save_strategy="steps", save_steps=3, **changes),
    }  # fmt: skip
    if kind == "GritTrainer":
        return GritTrainer(grit_manager=manager, callbacks=list(callbacks), **shared), manager
    return SFTTrainer(callbacks=[GritCallback(manager), *callbacks], **shared), manager
