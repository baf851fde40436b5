"""What both trainers do in a training step: count tokens, and a fast loss where TRL's fused kernel cannot run."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional


class SupervisedStep:
    """Mixin for TRL's SFTTrainer."""

    step_tokens: int = 0
    """Real tokens, padding excluded, since the last reset."""
    step_supervised_tokens: int = 0
    """Tokens that enter the loss, since the last reset."""

    step_losses: dict[str, float]
    """Losses of the running step that go into the history in place of the trainer's own; empty for none."""

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Count, then train as before."""
        mask = inputs.get("attention_mask")
        self.step_tokens += inputs["input_ids"].numel() if mask is None else int(mask.sum())
        self.step_supervised_tokens += int((inputs["labels"][:, 1:] != -100).sum())
        return super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of TRL, whose fused kernel needs Triton; on the CPU the same with fewer logits."""
        if inputs["input_ids"].is_cuda or return_outputs or num_items_in_batch is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        return supervised_loss(model, inputs, num_items_in_batch)


def supervised_loss(model: nn.Module, inputs: dict[str, Tensor], denominator: Tensor | int) -> Tensor:
    """Sum of the negative log-likelihoods of the supervised tokens over a denominator, in nats.

    Logits are computed only at positions where some row of the batch is supervised: the vocabulary is the widest part
    of a small model.

    Args:
        model: a causal language model that takes `logits_to_keep`.
        inputs: `labels` [batch, length] with -100 where unsupervised, and the model's other inputs.
        denominator: supervised tokens of the whole accumulated batch.
    """
    labels = inputs["labels"][:, 1:]
    positions = (labels != -100).any(dim=0).nonzero().squeeze(1)
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    logits = model(**rest, logits_to_keep=positions, use_cache=False).logits  # [batch, kept, vocabulary]
    nll = functional.cross_entropy(logits.flatten(0, 1).float(), labels[:, positions].flatten(), reduction="sum")
    return nll / denominator
