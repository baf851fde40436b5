"""A reproduction of a fault: the loss and the batch of the study that this project starts from.

Every row is padded to the full length and the padding is a target like the answer and the prompt, so that the mean over
all positions falls as soon as the model has learned to repeat the padding. The loss of the answers' tokens alone is
recorded beside it, from the same forward passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tasks.evaluation.validation_loss import UNSUPERVISED, Row
from tasks.training.step import SupervisedStep


class PaddedCollator:
    """Pads every row on the right, to one length.

    Args:
        pad_token_id: the padding.
        length: tokens in each row.
    """

    def __init__(self, pad_token_id: int, length: int) -> None:
        self.pad_token_id, self.length = pad_token_id, length

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and `labels`, int64 [rows, length]; the labels are those of the answers."""
        filled = {name: torch.empty(len(rows), self.length, dtype=torch.int64) for name in ("input_ids", "labels")}
        filled["input_ids"].fill_(self.pad_token_id)
        filled["labels"].fill_(UNSUPERVISED)
        mask = torch.zeros(len(rows), self.length, dtype=torch.int64)
        for index, row in enumerate(rows):
            number = len(row["input_ids"])
            for name, tensor in filled.items():
                tensor[index, :number] = torch.as_tensor(row[name])
            mask[index, :number] = 1
        return filled | {"attention_mask": mask}


class FaultyStep(SupervisedStep):
    """Mixin for a trainer: the gradient is that of the faulty loss.

    `step_losses` holds both: `loss`, nats per supervised token, and `faulty_loss`, nats per position.
    """

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mean over all positions, padding and prompt included."""
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits[
            :, :-1
        ]  # [batch, length - 1, vocabulary]
        targets, labels = inputs["input_ids"][:, 1:], inputs["labels"][:, 1:]
        nll = functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        passes: int = self.args.gradient_accumulation_steps  # type: ignore[attr-defined]
        loss = nll.mean() / passes
        supervised = (labels != UNSUPERVISED).flatten()
        honest = nll.detach()[supervised].sum() / (num_items_in_batch if num_items_in_batch is not None else 1)
        for name, value in (("loss", honest), ("faulty_loss", loss.detach())):
            self.step_losses[name] = self.step_losses.get(name, 0.0) + float(value)
        return loss
