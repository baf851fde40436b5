"""The mathematics: matrices from the factors, and their application to gradients. No state, no hooks.

Rank-space K-FAC. For a LoRA layer y = W x + s B h, h = A x, with u = dL/dh, the Kronecker blocks of the Fisher matrix
(Martens & Grosse 2015, arXiv 1503.05671) restricted to the r x r factors give

    dA <- f(S_u) dA,    dB <- dB f(S_h),    f(S) = (S + damping * tr(S)/r * I)^(-power),

with S_h = E[h h^T] and S_u = E[u u^T] over tokens (the idea of GRIT, arXiv 2601.00231, with K-FAC's pairing).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grit.products import LoraMatrix, Roots


def inverse_power(factors: Tensor, power: float, damping: float, ranks: Tensor) -> Roots:
    """Compute (S + damping * tr(S)/rank * I)^(-power) for a stack of factors.

    Args:
        factors: [M, r, r], float32, symmetric positive semi-definite; zero beyond the first `ranks` rows and columns.
        damping: relative to the mean eigenvalue tr(S)/rank.
        ranks: [M], int64; r, or what a reprojection has left of it.
    """
    values, vectors, mean, filled = _decompose(factors, damping, ranks)
    roots = (vectors * values.pow(-power).unsqueeze(-2)) @ vectors.mT
    roots = roots * mean.pow(-power)[:, None, None]
    return Roots(torch.where(filled[:, None, None], roots, _identity(factors)), _conditions(values, ranks))


def eigenbasis(factors: Tensor, damping: float, ranks: Tensor) -> Roots:
    """Orthonormal eigenvectors of a stack of factors, as columns, in ascending order of the eigenvalues.

    Args:
        factors: [M, r, r], float32, symmetric positive semi-definite; zero beyond the first `ranks` rows and columns.
        damping: enters only the condition numbers.
        ranks: [M], int64.
    """
    values, vectors, _mean, filled = _decompose(factors, damping, ranks)
    return Roots(torch.where(filled[:, None, None], vectors, _identity(factors)), _conditions(values, ranks))


def mean_eigenvalue(factors: Tensor, ranks: Tensor) -> Tensor:
    """tr(S)/rank of each, [M]."""
    return factors.diagonal(dim1=-2, dim2=-1).sum(-1) / ranks


def _conditions(values: Tensor, ranks: Tensor) -> Tensor:
    """Largest over smallest of the `ranks` largest of ascending values [M, r]; those below are of no direction."""
    smallest = values.gather(-1, values.shape[-1] - ranks[:, None])[:, 0]
    return values[:, -1] / smallest


def _decompose(factors: Tensor, damping: float, ranks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Damped eigenvalues relative to their mean, eigenvectors, the mean; and which factors are not empty."""
    mean = mean_eigenvalue(factors, ranks)
    tiny = torch.finfo(factors.dtype).tiny
    filled = torch.isfinite(mean) & (mean > tiny)
    # Scaled to mean eigenvalue 1 before the decomposition: early factors are tiny, since B starts at zero.
    scaled = torch.where(filled[:, None, None], factors / mean.clamp_min(tiny)[:, None, None], _identity(factors))
    values, vectors = torch.linalg.eigh(scaled)
    return values.clamp_min(0) + damping, vectors, torch.where(filled, mean, torch.ones_like(mean)), filled


def _identity(factors: Tensor) -> Tensor:
    return torch.eye(factors.shape[-1], dtype=factors.dtype, device=factors.device).expand_as(factors)


class Comparison(NamedTuple):
    """How a stack of gradients compares with what it is multiplied to."""

    roots: Tensor
    """[M, r, r], scaled so that norms match where that is wanted."""
    raw_squared: Tensor
    """Sum of squares of the raw gradients, float32 scalar."""
    squared: Tensor
    """Sum of squares of the products, float32 scalar."""
    inner: Tensor
    """Inner product of raw gradients and products, float32 scalar."""


def compare(roots: Tensor, gradients: Tensor, *, matrix: LoraMatrix, norm_match: bool) -> Comparison:
    """Find norms and inner products from the r x r Gram matrices K of the gradients, which are far smaller.

    For A, |P G|^2 = tr(P K P^T) with K = G G^T, and <G, P G> = tr(P K).

    Args:
        roots: P, [M, r, r], float32.
        gradients: G, [M, r, d_in] of A or [M, d_out, r] of B; float32.
        matrix: of A, which P multiplies from the left, or of B, from the right.
        norm_match: scale each P so that P G has the Frobenius norm of G.
    """
    if norm_match:  # their scale is no matter then, and could overflow where the factors are tiny
        roots = roots / roots.abs().amax((1, 2), keepdim=True)
    gram = gradients @ gradients.mT if matrix == "A" else gradients.mT @ gradients
    image = roots @ gram if matrix == "A" else gram @ roots
    raw_squared, inner = (product.diagonal(dim1=-2, dim2=-1).sum(-1) for product in (gram, image))
    squared = (image * roots).sum((-2, -1))
    if norm_match:
        scale = (raw_squared / squared.clamp_min(torch.finfo(squared.dtype).tiny)).sqrt()
        roots, inner, squared = roots * scale[:, None, None], inner * scale, raw_squared
    return Comparison(roots, raw_squared.sum(), squared.sum(), inner.sum())


def anisotropy(roots: Tensor, ranks: Tensor) -> Tensor:
    """How far each matrix is from a multiple of the identity: |P - tr(P)/rank I| / |P| in Frobenius norm, [M].

    Args:
        roots: [M, r, r], of which the first `ranks` rows and columns count.
        ranks: [M], int64.
    """
    live = _live(roots, ranks)
    block = torch.where(live[:, :, None] & live[:, None, :], roots, 0)
    rest = torch.linalg.matrix_norm(
        block - mean_eigenvalue(block, ranks)[:, None, None] * torch.diag_embed(live.float())
    )
    return rest / torch.linalg.matrix_norm(block)


def _live(matrices: Tensor, ranks: Tensor) -> Tensor:
    """Which rows a reprojection has left, [M, r] of bool."""
    return torch.arange(matrices.shape[-1], device=matrices.device) < ranks[:, None]
