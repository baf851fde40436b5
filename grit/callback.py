"""GRIT in any Transformers trainer, and its state in the trainer's checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from grit.manager import GRITManager

STATE_FILE = "grit_state.safetensors"


class GritState(TrainerCallback):
    """Attaches the manager to the optimizer, and keeps its state in the checkpoints. `GritTrainer` uses it.

    Args:
        manager: the manager of the model's adapters.
    """

    def __init__(self, manager: GRITManager) -> None:
        self.manager = manager
        self.resumed_from: Path | None = None
        """The checkpoint that training goes on from; without it `output_dir`/checkpoint-STEP."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to the optimizer; in a resumed training load the state.

        Raises:
            FileNotFoundError: the checkpoint has no state of GRIT.
        """
        self.manager.attach(kwargs["optimizer"])
        if state.global_step:
            directory = self.resumed_from or _checkpoint(args, state)
            file = directory / STATE_FILE
            if not file.is_file():
                raise FileNotFoundError(f"{file}: the checkpoint was made without GRIT; start again or resume without")
            self.manager.load_state_dict(load_file(file))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save the state beside the trainer's."""
        if state.is_world_process_zero:
            tensors = {name: value.cpu().contiguous() for name, value in self.manager.state_dict().items()}
            save_file(tensors, _checkpoint(args, state) / STATE_FILE)


class GritCallback(GritState):
    """GRIT in any `transformers.Trainer`: `callbacks=[GritCallback(manager)]`.

    Transformers clips the gradient before a callback can see it. With `norm_match` that makes no difference: the
    preconditioner is linear and keeps the norm. Without it the preconditioned gradient is clipped once more.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """As in `GritState`.

        Raises:
            ValueError: float16, whose loss scale a callback does not see; or more than one process.
        """
        if args.fp16 or args.world_size > 1:
            raise ValueError("GritCallback does not see float16's loss scale nor other processes: use GritTrainer")
        super().on_train_begin(args, state, control, **kwargs)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Precondition the accumulated gradient."""
        self.manager.step()
        if model is not None and args.max_grad_norm and not self.manager.config.norm_match:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
