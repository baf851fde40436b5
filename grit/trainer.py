"""Where GRIT plugs into TRL's trainer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from trl import SFTTrainer

from grit.manager import GRITManager


class GritTrainer(SFTTrainer):
    """TRL's SFTTrainer with the preconditioner between accumulation and clipping.

    Transformers clips before `on_pre_optimizer_step`, too late for a callback, so the clipping itself is extended: it
    runs once per optimizer step, on the full accumulated gradient. Under float16 the gradient is still scaled there;
    preconditioning is linear, so it commutes with the unscaling that precedes the clipping.

    Args:
        grit_manager: the manager of the model's adapters.
        **kwargs: as for SFTTrainer.

    Raises:
        ValueError: `max_grad_norm` is 0, with which Transformers never reaches the clipping; use `float("inf")`.
    """

    def __init__(self, *args: Any, grit_manager: GRITManager, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.args.max_grad_norm > 0:
            raise ValueError("max_grad_norm must be above 0 with GRIT; float('inf') turns clipping off")
        self.grit_manager = grit_manager

    @property
    def step_statistics(self) -> dict[str, float]:
        """Figures of the last optimizer step, see `GRITManager.precondition_gradients`."""
        return self.grit_manager.last_diagnostics

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Tell the manager what the loss is divided by, then train as before."""
        if num_items_in_batch is None:
            raise ValueError("GRIT needs the number of supervised tokens of the accumulated batch; are there labels?")
        self.grit_manager.loss_denominator = num_items_in_batch
        return super().training_step(model, inputs, num_items_in_batch)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        scaler: torch.amp.GradScaler | None = self.accelerator.scaler
        self.grit_manager.loss_scale = scaler.get_scale() if scaler is not None else 1.0
        self.grit_manager.step()
        return super()._clip_grad_norm(model)
