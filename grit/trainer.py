"""Where GRIT plugs into TRL's trainer."""

from __future__ import annotations

from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from trl import SFTTrainer

from grit.callback import GritState, check_setup
from grit.manager import GRITManager


class _State(GritState):
    """As for any trainer, but with the loss and the rows of this one, which also saves the state itself."""

    def __init__(self, manager: GRITManager, trainer: GritTrainer) -> None:
        super().__init__(manager)
        self._trainer = trainer

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        pass

    def find_basis(self, args: Any, model: Any, loader: Any) -> None:
        trainer = self._trainer
        steps = self.manager.config.basis_steps * args.gradient_accumulation_steps
        own = trainer.get_train_dataloader()
        batches = [trainer._prepare_inputs(batch) for batch in islice(own, steps)]
        if hasattr(own, "end"):
            own.end()  # Accelerate's loaders tell a shared state when they begin, and only exhausted ones when they end

        def summed_loss(batch: dict[str, Any]) -> Tensor:
            with trainer.compute_loss_context_manager():
                loss: Tensor = trainer.compute_loss(model, dict(batch), num_items_in_batch=1)
            return loss

        # The passes are no training: TRL's counts and means must not hold them.
        kept = deepcopy(trainer._metrics), trainer._total_train_tokens
        self.set_basis(model, batches, summed_loss, args.seed)
        trainer._metrics, trainer._total_train_tokens = kept


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
        ValueError: `max_grad_norm` is 0, with which Transformers never reaches the clipping; use `float("inf")`. FSDP,
            DeepSpeed, DataParallel, torch_compile.
    """

    def __init__(self, *args: Any, grit_manager: GRITManager, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_setup(self.args, fsdp=self.is_fsdp_enabled, deepspeed=self.is_deepspeed_enabled)
        if not self.args.max_grad_norm > 0:
            raise ValueError("max_grad_norm must be above 0 with GRIT; float('inf') turns clipping off")
        self.grit_manager = grit_manager
        self._grit_state = _State(grit_manager, self)
        self.add_callback(self._grit_state)

    @property
    def step_statistics(self) -> dict[str, float]:
        """Figures of the last optimizer step, see `grit.diagnostics.step_figures`."""
        return self.grit_manager.last_diagnostics

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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a step's figures with its loss, as `grit/NAME`."""
        if "loss" in logs:
            logs.update(self._grit_state.figures())
        super().log(logs, start_time)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        scaler: torch.amp.GradScaler | None = self.accelerator.scaler
        scale = scaler.get_scale() if scaler is not None else 1.0
        self.grit_manager.loss_scale = self.grit_manager.gradient_scale = scale
        self.grit_manager.step()
        return super()._clip_grad_norm(model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:  # `on_save` comes when older checkpoints are gone already
            self._grit_state.save(Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._grit_state.resumed_from = Path(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
