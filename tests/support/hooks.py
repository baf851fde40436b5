"""Hooks of torch's modules and optimizers, and LoRA layers that go past them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from grit.modules import LoraModule


def hook_count(owner: nn.Module | Optimizer) -> int:
    """Hooks of every kind that are registered with an optimizer, or with a model and all that is in it."""
    parts: Iterable[Any] = owner.modules() if isinstance(owner, nn.Module) else [owner]
    return sum(len(hooks) for part in parts for name, hooks in vars(part).items() if name.endswith("_hooks"))


def fuse(module: LoraModule) -> None:
    """Let the layer multiply with the weights and never call A or B, as fused kernels do."""

    def fused(x: Tensor, layer: Any = module.layer, module: LoraModule = module) -> Tensor:
        return layer.base_layer(x) + module.scaling * (x @ module.lora_a.weight.T @ module.lora_b.weight.T)

    setattr(module.layer, "forward", fused)  # noqa: B010, mypy refuses to assign to a method
