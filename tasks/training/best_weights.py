"""During training: keeping the weights of the lowest validation loss, and stopping where it falls no more."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

FILE = "best.safetensors"


class BestWeights(TrainerCallback):
    """Looks at each validation after the first step. Must come after what measures it.

    Args:
        network: whose trainable weights are kept.
        validation: pairs of step and loss, which grow while training; step 0 is the untrained model.
        keep: hold a copy of the weights of the lowest loss, for `restore`.
        patience: validations in a row without a new lowest loss, after which training stops; none: it does not.
    """

    def __init__(
        self, network: PeftModel, validation: Sequence[tuple[int, float]], *, keep: bool, patience: int | None
    ) -> None:
        self.network, self.validation, self.keep, self.patience = network, validation, keep, patience
        self.stopped = False
        """Whether training was stopped here."""
        self._looked_at = 0
        self._weights: dict[str, Tensor] = {}

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """After a validation: keep the weights, or stop."""
        losses = [loss for step, loss in self.validation if step > 0]
        if len(losses) == self._looked_at:
            return control
        self._looked_at = len(losses)
        since = len(losses) - 1 - losses.index(min(losses))
        if self.keep and since == 0:
            self._weights = {name: weight.detach().to("cpu", copy=True) for name, weight in self._trainable().items()}
        if self.patience is not None and since >= self.patience and state.global_step < state.max_steps:
            self.stopped = control.should_training_stop = True
            control.should_save = False  # gone on from here, training would make one step more
        return control

    def lowest(self) -> list[float] | None:
        """Step and loss of the lowest validation loss, the first of equal ones; none before any."""
        measured = [[step, loss] for step, loss in self.validation if step > 0]
        return min(measured, key=lambda point: point[1], default=None)

    def restore(self) -> None:
        """Give the network the weights that were kept, if there are any."""
        trainable = self._trainable()
        with torch.no_grad():
            for name, kept in self._weights.items():
                trainable[name].copy_(kept)

    def save(self, checkpoint: Path) -> None:
        """Write the kept weights into a checkpoint."""
        if self._weights:
            save_file(self._weights, checkpoint / FILE)

    def go_on_from(self, checkpoint: Path) -> None:
        """Take over what was kept before the checkpoint; `validation` must be that of the checkpoint already."""
        self._looked_at = sum(step > 0 for step, _ in self.validation)
        if (checkpoint / FILE).is_file():
            self._weights = load_file(checkpoint / FILE)

    def _trainable(self) -> dict[str, Tensor]:
        return {name: weight for name, weight in self.network.named_parameters() if weight.requires_grad}
