"""The optimizers that `training.optimizer` can name: who makes each, and what GRIT can do with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tasks.settings.finetune import LoraSettings, Optimizer, TrainingSettings

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import optim

    Maker = Callable[[PeftModel, LoraSettings, TrainingSettings], optim.Optimizer]

LORA_PLUS_RATIO = 16.0
"""B's learning rate over A's; the value that the paper of LoRA+ (arXiv 2402.12354) recommends."""


@dataclass(frozen=True)
class OptimizerKind:
    """One optimizer."""

    maker: str | Maker
    """What Transformers' trainer calls it, where the trainer makes it; else a function that does. It is given the
    network with its adapter in float32, the adapter's settings and the training's. It takes learning rate and weight
    decay from them, and only parameters that require a gradient."""
    takes_grit: bool
    """Whether GRIT can go before it: whether it takes gradients as they are, and does not precondition them itself."""
    moments_obstacle: str | None = None
    """Why GRIT cannot act on Adam's moments, in words that follow "Adam's moments, which"; none where it can: they are
    the plain tensors `exp_avg` and `exp_avg_sq`."""


def _lora_plus(network: PeftModel, lora: LoraSettings, training: TrainingSettings) -> optim.Optimizer:
    from peft.optimizers import create_loraplus_optimizer
    from torch.optim import AdamW

    return create_loraplus_optimizer(
        network,
        AdamW,
        lr=training.learning_rate / LORA_PLUS_RATIO**0.5,
        loraplus_lr_ratio=LORA_PLUS_RATIO,
        loraplus_weight_decay=training.weight_decay,
    )


def _lora_fa(network: PeftModel, lora: LoraSettings, training: TrainingSettings) -> optim.Optimizer:
    """LoRA-FA, which freezes every A."""
    from peft.optimizers import create_lorafa_optimizer

    return create_lorafa_optimizer(
        network, lora.r, lora.alpha, lr=training.learning_rate, weight_decay=training.weight_decay
    )


def _riemannian(network: PeftModel, lora: LoraSettings, training: TrainingSettings) -> optim.Optimizer:
    from peft.optimizers import create_riemannian_optimizer
    from torch.optim import AdamW

    return create_riemannian_optimizer(network, AdamW, lr=training.learning_rate, weight_decay=training.weight_decay)


OPTIMIZERS: dict[Optimizer, OptimizerKind] = {
    "adamw_torch": OptimizerKind("adamw_torch", takes_grit=True),
    "adamw_8bit": OptimizerKind("adamw_8bit", takes_grit=True, moments_obstacle="8-bit Adam keeps in blocks"),
    "lora_plus": OptimizerKind(_lora_plus, takes_grit=False),
    "lora_fa": OptimizerKind(_lora_fa, takes_grit=False),
    "riemannian": OptimizerKind(_riemannian, takes_grit=False),
}
"""By the names of the setting `training.optimizer`. PEFT's change gradients themselves, so GRIT does not go before
them."""


def trainers_name(optimizer: Optimizer) -> str:
    """What Transformers' trainer is told to make; where it makes nothing, a name that it accepts.

    Args:
        optimizer: of the settings.
    """
    maker = OPTIMIZERS[optimizer].maker
    return maker if isinstance(maker, str) else "adamw_torch"


def make_optimizer(network: PeftModel, lora: LoraSettings, training: TrainingSettings) -> optim.Optimizer | None:
    """The optimizer of the settings; none where the trainer makes it itself.

    Args:
        network: with its adapter in float32.
        lora: rank and scale.
        training: optimizer, learning rate and weight decay.
    """
    maker = OPTIMIZERS[training.optimizer].maker
    return None if isinstance(maker, str) else maker(network, lora, training)
