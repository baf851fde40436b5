"""What the model's own calls say: which tokens are real, and what the loss is divided by."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

Call = dict[str, Any]
"""Arguments of one call of the model, by name."""


def base_of(model: nn.Module) -> Any:
    """The model below PEFT's wrapper, whose own forward takes `*args`; or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def check_one_length(model: nn.Module) -> None:
    """Check that all layers of the model see the same tokens.

    Raises:
        ValueError: an encoder-decoder.
    """
    base = base_of(model)
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(base).__name__}: GRIT does not handle encoder-decoders, whose layers see tokens of two sequences"
        )


def reader(model: nn.Module) -> Callable[[tuple[Any, ...], dict[str, Any]], Call]:
    """What turns the positional and keyword arguments of a call into all of them by name."""
    names = list(inspect.signature(base_of(model).forward).parameters)
    return lambda args, kwargs: dict(zip(names, args, strict=False)) | kwargs


def token_mask(call: Call) -> Tensor | None:
    """The mask of real tokens of one call, [batch, length] of bool, or None where every token is real.

    Raises:
        ValueError: the call's mask has another form, which need not tell padding from tokens that see only themselves.
    """
    mask = call.get("attention_mask")
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        form = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"GRIT reads padding from an attention_mask of [batch, length], and the model was called with one of {form}"
            "; where nothing is padded, pass none"
        )
    return mask.bool()


class LossDenominator:
    """What the loss of an accumulated batch is divided by.

    Transformers' trainer passes it to the model as `num_items_in_batch`. TRL's divides by the same number outside of
    the model: it is the number of labels that are predicted, in all calls of the step.

    Args:
        model: a causal language model, whose loss skips the first label, or another.
    """

    def __init__(self, model: nn.Module) -> None:
        base = base_of(model)
        # As in Transformers' `Trainer._get_num_items_in_batch`.
        self._first = int(getattr(getattr(base, "loss_function", None), "__name__", "") == "ForCausalLMLoss")
        self._given: Tensor | int | None = None
        self._counted: list[Tensor | None] = []

    def add(self, call: Call) -> None:
        """Take over one call of the step."""
        if call.get("num_items_in_batch") is not None:
            self._given = call["num_items_in_batch"]
            return
        labels, first = call.get("shift_labels"), 0
        if labels is None:
            labels, first = call.get("labels"), self._first
        self._counted.append(None if labels is None else (labels[..., first:] != -100).sum())

    def take(self) -> Tensor | int | None:
        """What the calls since the last time say, as a number or a scalar tensor; None where they do not."""
        given, calls = self._given, len(self._counted)
        counts = [count for count in self._counted if count is not None]
        self.clear()
        if given is not None:
            return given
        return torch.stack(counts).sum() if counts and len(counts) == calls else None

    def clear(self) -> None:
        """Forget the calls so far."""
        self._given, self._counted = None, []


def without_padding(rows: Tensor, mask: Tensor | None, name: str) -> Tensor:
    """Set the rows of padding to zero.

    Args:
        rows: [batch * length, d].
        mask: [batch, length] of bool, on any device, or None where every token is real.
        name: of the layer, for the message.

    Raises:
        ValueError: mask and rows do not fit each other.
    """
    if mask is None:
        return rows
    if mask.numel() != len(rows):
        raise ValueError(
            f"{name}: attention mask of {mask.numel()} tokens, layer input of {len(rows)}. GRIT needs layers that see "
            "every token: leave this one out of target_modules, or with lm_head pass no logits_to_keep"
        )
    return rows.masked_fill(~mask.to(rows.device).reshape(-1, 1), 0)  # not a product, which would keep a NaN
