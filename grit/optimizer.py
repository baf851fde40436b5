"""What of GRIT happens around the optimizer's own step: rewritten updates, and moments that follow a change of basis.

It works with any optimizer that, like torch's AdamW, decouples weight decay (arXiv 1711.05101) and keeps `exp_avg` and
`exp_avg_sq` for each parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class AttachedOptimizer:
    """An optimizer whose step is watched.

    Args:
        optimizer: the optimizer, or a wrapper that keeps it as `.optimizer` (as Accelerate's does).
        parameters: the parameters whose update is rewritten; none where nothing is.
        after: called after each step with the rewriting `AttachedOptimizer`.

    Raises:
        ValueError: a parameter is not the optimizer's.
    """

    def __init__(self, optimizer: Any, parameters: list[Tensor], after: Callable[[AttachedOptimizer], None]) -> None:
        while not isinstance(optimizer, Optimizer) or hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        self.optimizer: Optimizer = optimizer
        self._groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        if any(id(parameter) not in self._groups for parameter in parameters):
            raise ValueError("a LoRA weight is not among the optimizer's parameters")
        self._parameters = parameters
        self._before: dict[int, Tensor] = {}
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self._remember()),
            optimizer.register_step_post_hook(lambda *_: after(self)),
        ]

    def start(self, parameter: Tensor) -> Tensor:
        """The parameter before the step, with the decoupled weight decay applied."""
        group = self._groups[id(parameter)]
        return self._before[id(parameter)] * (1 - group["lr"] * group.get("weight_decay", 0.0))

    def momentum(self, parameter: Tensor) -> Tensor:
        """Adam's first moment of the parameter.

        Raises:
            ValueError: the optimizer keeps none under the name `exp_avg`.
        """
        state = self.optimizer.state[parameter]
        if "exp_avg" not in state or "exp_avg_sq" not in state:
            name = type(self.optimizer).__name__
            raise ValueError(f"GRIT needs an optimizer with exp_avg and exp_avg_sq (torch's AdamW); {name} has none")
        moment: Tensor = state["exp_avg"]
        return moment

    def change_basis(self, parameter: Tensor, matrix: Tensor, *, left: bool) -> None:
        """Let the moments follow a change of basis of the gradient: m -> P m, v -> (P * P) v, entry by entry squared.

        The second is exact for gradients with uncorrelated entries, the assumption that Adam itself makes.

        Args:
            parameter: A (`left`, [r, d_in]) or B ([d_out, r]).
            matrix: P, [r, r]; for B the product is from the right.
            left: which of the two.
        """
        if parameter not in self.optimizer.state:
            return  # before the first step
        first = self.momentum(parameter)
        second = self.optimizer.state[parameter]["exp_avg_sq"]
        for moment, factor in ((first, matrix), (second, matrix.square())):
            factor = factor.to(moment.dtype)
            moment.copy_(factor @ moment if left else moment @ factor)

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _remember(self) -> None:
        self._before = {id(p): p.detach().clone() for p in self._parameters}


def rewrite(
    attached: AttachedOptimizer,
    parameters: list[Tensor],
    change: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Replace the updates of parameters of one shape.

    Args:
        attached: the optimizer, after its step.
        parameters: of one shape.
        change: makes the new updates from the optimizer's and from its first moments, each [M, a, b].
    """
    starts = torch.stack([attached.start(parameter) for parameter in parameters])
    updates = torch.stack([parameter.detach() for parameter in parameters]) - starts
    momenta = torch.stack([attached.momentum(parameter) for parameter in parameters])
    new = starts + change(updates, momenta)
    torch._foreach_copy_([parameter.data for parameter in parameters], list(new.unbind()))
