"""Which matrices each variant multiplies the gradients of A and B with."""

from __future__ import annotations

import torch
from torch import Tensor

from grit.config import GRITConfig
from grit.factors import FactorGroup
from grit.modules import LoraModule
from grit.preconditioning import Roots, eigenbasis, inverse_power


def multipliers(group: FactorGroup, config: GRITConfig) -> tuple[Roots, Roots]:
    """For A from the left and for B from the right.

    `kfac`, `graft` (and `adamw`, which only measures): f(S_u) and f(S_h), K-FAC's pairing. `published`: the two
    swapped (arXiv 2601.00231). `riemannian`: f(B^T B) and f(A A^T) (arXiv 2402.02347), to which K-FAC reduces where
    E[g g^T] and E[x x^T] are multiples of the identity. `eigen_adam`: the eigenvectors, U_u^T and U_h. f is the damped
    inverse power.

    Args:
        group: the factors of the modules of one rank.
        config: variant, power and damping.

    Returns:
        Two stacks of [M, r, r], float32.
    """
    if config.variant == "eigen_adam":
        for_a, for_b = (eigenbasis(sigma, config.kfac_damping, group.ranks) for sigma in (group.sigma_u, group.sigma_h))
        return Roots(for_a.matrices.mT, for_a.conditions), for_b
    if config.variant == "riemannian":
        factors = _gram(group.modules, left=False), _gram(group.modules, left=True)
    elif config.variant == "published":
        factors = group.sigma_h, group.sigma_u
    else:
        factors = group.sigma_u, group.sigma_h
    for_a, for_b = (inverse_power(factor, config.power, config.kfac_damping, group.ranks) for factor in factors)
    return for_a, for_b


def _gram(modules: list[LoraModule], *, left: bool) -> Tensor:
    """A A^T (`left`) or B^T B of each module, [M, r, r], float32."""
    weights = (module.weight(left=left).detach().float() for module in modules)
    return torch.stack([weight @ weight.mT if left else weight.mT @ weight for weight in weights])
