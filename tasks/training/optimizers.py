"""PEFT's own optimizers for LoRA: methods that differ from the baseline in the optimizer alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.settings.finetune import LoraSettings, TrainingSettings

if TYPE_CHECKING:
    from peft import PeftModel
    from torch.optim import Optimizer

PEFT_OPTIMIZERS = ("lora_plus", "lora_fa", "riemannian")
"""Of the setting `training.optimizer` those that PEFT makes."""

LORA_PLUS_RATIO = 16.0
"""B's learning rate over A's; the value that the paper of LoRA+ (arXiv 2402.12354) recommends."""


def peft_optimizer(network: PeftModel, lora: LoraSettings, training: TrainingSettings) -> Optimizer | None:
    """The optimizer of the settings if it is one of PEFT's; none where the trainer makes it itself.

    Args:
        network: with its adapter in float32; LoRA-FA freezes every A.
        lora: rank and scale.
        training: optimizer, learning rate and weight decay.
    """
    from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer
    from torch.optim import AdamW

    rate, decay = training.learning_rate, training.weight_decay
    if training.optimizer == "lora_plus":
        slower = rate / LORA_PLUS_RATIO**0.5
        return create_loraplus_optimizer(
            network, AdamW, lr=slower, loraplus_lr_ratio=LORA_PLUS_RATIO, loraplus_weight_decay=decay
        )
    if training.optimizer == "lora_fa":
        return create_lorafa_optimizer(network, lora.r, lora.alpha, lr=rate, weight_decay=decay)
    if training.optimizer == "riemannian":
        return create_riemannian_optimizer(network, AdamW, lr=rate, weight_decay=decay)
    return None
