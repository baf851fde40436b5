"""What GRIT does in each module: how far it turns the gradient, and how many directions its factors hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grit.manager import GRITManager

PREFIX = "base_model.model."


def gradients(manager: GRITManager) -> list[Tensor]:
    """A copy of the gradients of A and B of each module, one after the other: float32, 1-dimensional."""
    return [
        torch.cat(
            [weight.grad.detach().float().flatten().clone() for weight in module.weights if weight.grad is not None]
        )
        for module in manager.modules
    ]


def module_figures(manager: GRITManager, raw: list[Tensor]) -> list[dict[str, Any]]:
    """Figures of one optimizer step by module.

    Args:
        manager: after its step.
        raw: what `gradients` gave before it.

    Returns:
        For each module its `module` (path), the `cosine` between raw and preconditioned gradient (none for variants
        that act on the optimizer's update), and the `effective_rank_h` and `effective_rank_u` of its two factors.
    """
    ranks: dict[str, tuple[float, float]] = {}
    for preconditioner in manager.preconditioners:
        factors = preconditioner.factors
        of_h, of_u = effective_rank(factors.sigma_h), effective_rank(factors.sigma_u)
        for module, h, u in zip(factors.modules, of_h.tolist(), of_u.tolist(), strict=True):
            ranks[module.path] = h, u
    on_gradient = not manager.config.variant_row.acts_on_optimizer
    return [
        {
            "module": module.path.removeprefix(PREFIX),
            "cosine": float(torch.cosine_similarity(before, after, dim=0)) if on_gradient else None,
            "effective_rank_h": ranks[module.path][0],
            "effective_rank_u": ranks[module.path][1],
        }
        for module, before, after in zip(manager.modules, raw, gradients(manager), strict=True)
    ]


def effective_rank(matrices: Tensor) -> Tensor:
    """The exponential of the entropy of the normalised eigenvalues (Roy and Vetterli, EUSIPCO 2007).

    Args:
        matrices: symmetric and positive semi-definite, [M, r, r].

    Returns:
        [M], float32, from 1 (one direction) to r (all alike); 0 for a matrix of zeros.
    """
    values = torch.linalg.eigvalsh(matrices.float()).clamp_min(0)
    total = values.sum(-1, keepdim=True)
    shares = values / total.clamp_min(torch.finfo(values.dtype).tiny)
    return torch.special.entr(shares).sum(-1).exp() * (total.squeeze(-1) > 0)
