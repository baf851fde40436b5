"""Which tokens are real, read from the `attention_mask` of the model's own call."""

from __future__ import annotations

import inspect
from typing import Any

from peft import PeftModel
from torch import Tensor, nn


def argument_names(model: nn.Module) -> list[str]:
    """Names of the arguments that the model's forward takes in order.

    Args:
        model: a PEFT model, whose own forward takes `*args`, or any other.
    """
    called = model.get_base_model() if isinstance(model, PeftModel) else model
    return list(inspect.signature(called.forward).parameters)


def token_mask(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The mask of real tokens of one call, [batch, length] of bool, or None where every token is real.

    Args:
        names: of the positional arguments.
        args: the positional arguments of the call.
        kwargs: its keyword arguments.
    """
    mask = (dict(zip(names, args, strict=False)) | kwargs).get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def without_padding(rows: Tensor, mask: Tensor | None, name: str) -> Tensor:
    """Set the rows of padding to zero.

    Args:
        rows: [batch * length, d].
        mask: [batch, length] of bool, or None where every token is real.
        name: of the layer, for the message.

    Raises:
        ValueError: mask and rows do not fit each other.
    """
    if mask is None:
        return rows
    if mask.numel() != len(rows):
        raise ValueError(f"{name}: attention mask of {mask.numel()} tokens, layer input of {len(rows)}")
    return rows * mask.reshape(-1, 1)
