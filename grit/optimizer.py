"""What of GRIT happens around the optimizer's own step: rewritten updates, and moments that follow a change of basis.

It works with any optimizer that, like torch's AdamW, decouples weight decay (arXiv 1711.05101) and keeps `exp_avg` and
`exp_avg_sq` for each parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from grit.products import LoraMatrix


class AttachedOptimizer:
    """An optimizer whose step is watched.

    Args:
        optimizer: the optimizer, or a wrapper that keeps it as `.optimizer` (as Accelerate's does).
        parameters: those that it must hold.
        rewritten: those whose update is rewritten; none where nothing is.
        after: called after each step with this object.

    Raises:
        ValueError: a parameter is not the optimizer's; AMSGrad; weight decay that is not decoupled.
    """

    def __init__(
        self,
        optimizer: Any,
        parameters: Sequence[Tensor],
        rewritten: Sequence[Tensor],
        after: Callable[[AttachedOptimizer], None],
    ) -> None:
        while not isinstance(optimizer, Optimizer) or hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        self.optimizer: Optimizer = optimizer
        for group in optimizer.param_groups:
            _check_options(group)
        groups = self._groups()
        if any(id(parameter) not in groups for parameter in parameters):
            raise ValueError("a LoRA weight is not among the optimizer's parameters")
        self.steps = 0
        """Steps since it was attached."""
        self._rewritten, self._after = rewritten, after
        self._starts: dict[int, Tensor] = {}
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self.before_step()),
            optimizer.register_step_post_hook(lambda *_: self.after_step()),
        ]

    def updates(self, parameters: list[Tensor]) -> list[Tensor]:
        """What the step added to the parameters, decoupled weight decay apart."""
        now = [parameter.detach() for parameter in parameters]
        return list(torch._foreach_sub(now, self._starts_of(parameters)))

    def replace_updates(self, parameters: list[Tensor], updates: list[Tensor]) -> None:
        """Let the parameters be as if the step had added these."""
        data = [parameter.data for parameter in parameters]
        torch._foreach_copy_(data, self._starts_of(parameters))
        torch._foreach_add_(data, updates)

    def momenta(self, parameters: list[Tensor]) -> list[Tensor]:
        """Adam's first moments of several parameters, see `momentum`."""
        return [self.momentum(parameter) for parameter in parameters]

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

    def change_basis(self, parameter: Tensor, turn: Tensor, *, matrix: LoraMatrix) -> None:
        """Let the moments follow a change of basis of the gradient: m -> P m, v -> (P * P) v, entry by entry squared.

        The second is exact for gradients with uncorrelated entries, the assumption that Adam itself makes.

        Args:
            parameter: A ([r, d_in]) or B ([d_out, r]).
            turn: P, [r, r]; for B the product is from the right.
            matrix: which of the two the parameter is.
        """
        if parameter not in self.optimizer.state:
            return  # before the first step
        first = self.momentum(parameter)
        second = self.optimizer.state[parameter]["exp_avg_sq"]
        for moment, factor in ((first, turn), (second, turn.square())):
            factor = factor.to(moment.dtype)
            moment.copy_(factor @ moment if matrix == "A" else moment @ factor)

    def before_step(self) -> None:
        """Keep the parameters as they are before the optimizer's step, with its weight decay applied; a hook."""
        self._starts, groups = {}, self._groups()
        for parameter in self._rewritten:
            group = groups[id(parameter)]
            self._starts[id(parameter)] = parameter.detach() * (1 - group["lr"] * group.get("weight_decay", 0.0))

    def after_step(self) -> None:
        """Call what is to be called after the optimizer's step, and count it; a hook."""
        self._after(self)
        self._starts = {}
        self.steps += 1

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _groups(self) -> dict[int, dict[str, Any]]:
        """The options of each parameter; read anew each time, since `load_state_dict` replaces them."""
        return {id(p): group for group in self.optimizer.param_groups for p in group["params"]}

    def _starts_of(self, parameters: list[Tensor]) -> list[Tensor]:
        return [self._starts[id(parameter)] for parameter in parameters]


def _check_options(group: dict[str, Any]) -> None:
    if group.get("amsgrad"):
        raise ValueError(
            "GRIT does not handle amsgrad, whose largest second moments cannot follow a basis: turn it off"
        )
    if group.get("weight_decay") and group.get("decoupled_weight_decay") is False:
        raise ValueError("GRIT needs decoupled weight decay: use torch's AdamW, or set weight_decay to 0")
