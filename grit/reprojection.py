"""Reprojection: A and B written in the balanced basis of rank space, and the rank cut where little happens.

A change of basis (B, A) -> (B Q^-1, Q A) leaves B A as it is and takes h to Q h and u to Q^-T u. In the balanced basis
(Moore 1981, IEEE TAC 26(1), for linear systems; here on the factors of K-FAC) both second moments are diagonal. It
follows from the eigenvectors V of S_h^(1/2) S_u S_h^(1/2): Q = D V^T S_h^(-1/2), with D diagonal and free. Its
eigenvalues e_i = E[h_i^2] E[u_i^2] are the energies of the directions: how much the loss feels each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grit.config import GRITConfig
from grit.factors import FactorGroup
from grit.modules import LoraModule
from grit.optimizer import AttachedOptimizer
from grit.preconditioning import mean_eigenvalue


def balanced_basis(sigma_h: Tensor, sigma_u: Tensor, damping: float, ranks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The basis in which both factors are diagonal, most energetic direction first.

    Args:
        sigma_h: [M, r, r], float32.
        sigma_u: [M, r, r], float32.
        damping: added to S_h, relative to its mean eigenvalue.
        ranks: [M], int64: what earlier cuts have left of r.

    Returns:
        Q [M, r, r], its inverse, and the energies [M, r] relative to their sum; the identity where a factor is empty.
    """
    rank = sigma_h.shape[-1]
    identity = torch.eye(rank, device=sigma_h.device).expand_as(sigma_h)
    means = [mean_eigenvalue(factor, ranks)[:, None, None] for factor in (sigma_h, sigma_u)]
    filled = (means[0] > 0) & (means[1] > 0) & torch.isfinite(means[0] + means[1])  # [M, 1, 1]
    h, u = (
        torch.where(filled, factor / mean.clamp_min(torch.finfo(mean.dtype).tiny), identity)
        for factor, mean in zip((sigma_h, sigma_u), means, strict=True)
    )
    values, vectors = torch.linalg.eigh(h + damping * identity)
    roots = values.clamp_min(torch.finfo(values.dtype).eps).sqrt().unsqueeze(-2)
    half, inverse_half = (vectors * roots) @ vectors.mT, (vectors / roots) @ vectors.mT
    energies, v = torch.linalg.eigh(half @ u @ half)
    energies, v = energies.flip(-1).clamp_min(0), v.flip(-1)
    q, inverse = v.mT @ inverse_half, half @ v
    return torch.where(filled, q, identity), torch.where(filled, inverse, identity), energies / energies.sum(-1, True)


def effective_ranks(energies: Tensor, threshold: float, least: int) -> Tensor:
    """The smallest ranks whose directions hold a share of the energy.

    Args:
        energies: [M, r], in descending order, adding up to 1.
        threshold: the share, in (0, 1]; 1 keeps all.
        least: no rank falls below this.

    Returns:
        [M], int64.
    """
    rank = energies.shape[-1]
    if threshold >= 1:
        return torch.full(energies.shape[:1], rank, device=energies.device)
    needed = (energies.cumsum(-1) < threshold).sum(-1) + 1
    return needed.clamp(min(least, rank), rank)


@torch.no_grad()
def reproject(factors: FactorGroup, attached: AttachedOptimizer, config: GRITConfig) -> None:
    """Write A, B, their moments and the factors in the balanced basis, and cut the rank.

    Without a cut, B A stays as it is. With one, the least energetic directions are set to zero in A and B: their
    gradients are zero from then on, so they stay zero. Modules whose factors or A are still empty are left alone.

    Args:
        factors: of the modules of one rank.
        attached: the optimizer, after its step.
        config: damping, threshold and least rank.
    """
    q, inverse, energies = balanced_basis(factors.sigma_h, factors.sigma_u, config.kfac_damping, factors.ranks)
    ready = factors.samples >= config.kfac_min_samples
    identity = torch.eye(q.shape[-1], device=q.device)
    has_rows = torch.stack([module.lora_a.weight.any() for module in factors.modules])
    changed = ready & has_rows & (factors.mean_u.diagonal(dim1=-2, dim2=-1).sum(-1) > 0)
    ranks = effective_ranks(energies, config.rank_adaptation_threshold, config.min_lora_rank)
    ranks = torch.where(changed, torch.minimum(ranks, factors.ranks), factors.ranks)
    q, inverse = (torch.where(changed[:, None, None], change, identity) for change in (q, inverse))
    for index, module in enumerate(factors.modules):
        if changed[index]:
            q[index], inverse[index] = _scaled_and_cut(module, q[index], inverse[index], int(ranks[index]))
            _change_basis(module, q[index], inverse[index], attached)
    factors.change_basis(q, inverse)
    factors.ranks.copy_(ranks)


def _scaled_and_cut(module: LoraModule, q: Tensor, inverse: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Choose D so that each row of Q A has the root mean square norm of A's rows, and cut."""
    a = module.lora_a.weight.float()
    live = torch.linalg.vector_norm(a, dim=1).square()
    wanted = (live.sum() / (live > 0).sum()).sqrt()
    norms = torch.linalg.vector_norm(q @ a, dim=1)
    d = wanted / torch.maximum(norms, 1e-6 * wanted)  # a direction that A has not got stays out of the division
    kept = torch.arange(len(q), device=q.device) < rank
    return torch.where(kept[:, None], d[:, None] * q, 0), torch.where(kept, inverse / d, 0)


def _change_basis(module: LoraModule, q: Tensor, inverse: Tensor, attached: AttachedOptimizer) -> None:
    a, b = module.lora_a.weight, module.lora_b.weight
    a.data.copy_(q @ a.float())
    b.data.copy_(b.float() @ inverse)
    attached.change_basis(a, inverse.mT, matrix="A")
    attached.change_basis(b, q.mT, matrix="B")
