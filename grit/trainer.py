"""Where GRIT plugs into TRL's trainer."""

from __future__ import annotations

import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from trl import SFTTrainer

from grit.basis import set_gradient_basis
from grit.callback import GritState
from grit.manager import GRITManager


class GritTrainer(SFTTrainer):
    """TRL's SFTTrainer with GRIT between accumulation and clipping.

    Transformers clips before `on_pre_optimizer_step`, too late for a callback, so the clipping itself is extended: it
    runs once per optimizer step, on the full accumulated gradient. Under float16 the gradient is still scaled there;
    preconditioning is linear, so it commutes with the unscaling that precedes the clipping. The first basis is found
    when training starts; GRIT's state is part of each checkpoint.

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
        self._grit_state = GritState(grit_manager)
        self.add_callback(self._grit_state)

    @property
    def step_statistics(self) -> dict[str, float]:
        """Figures of the last optimizer step, see `GRITManager.precondition_gradients`."""
        return self.grit_manager.last_diagnostics

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Find the first basis, then train as before.

        It changes no random number that the training draws: the rows come in the same order with and without.
        """
        resumed = kwargs.get("resume_from_checkpoint") or (args[0] if args else None)
        if self.grit_manager.config.basis != "initial" and not resumed:
            started = time.perf_counter()
            cuda = [self.args.device] if self.args.device.type == "cuda" else []
            with self.grit_manager.paused(), torch.random.fork_rng(devices=cuda):
                self._set_basis()
            self.grit_manager.basis_seconds = time.perf_counter() - started
        return super().train(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Tell the manager what the loss is divided by, then train as before."""
        if num_items_in_batch is None:
            raise ValueError("GRIT needs the number of supervised tokens of the accumulated batch; are there labels?")
        # The loss is multiplied by the number of processes, over which DDP then averages.
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        self.grit_manager.loss_denominator = num_items_in_batch / processes
        return super().training_step(model, inputs, num_items_in_batch)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        scaler: torch.amp.GradScaler | None = self.accelerator.scaler
        self.grit_manager.loss_scale = scaler.get_scale() if scaler is not None else 1.0
        self.grit_manager.step()
        return super()._clip_grad_norm(model)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._grit_state.resumed_from = Path(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _set_basis(self) -> None:
        config = self.grit_manager.config
        model: Any = self.model
        steps = config.basis_steps * self.args.gradient_accumulation_steps
        batches = [self._prepare_inputs(batch) for batch in islice(self.get_train_dataloader(), steps)]

        def summed_loss(batch: dict[str, Any]) -> Tensor:
            with self.compute_loss_context_manager():
                loss: Tensor = self.compute_loss(model, dict(batch), num_items_in_batch=1)
            return loss

        model.train()
        whitened = config.basis == "whitened_gradient"
        set_gradient_basis(model, batches, summed_loss, whitened=whitened, seed=self.args.seed)
