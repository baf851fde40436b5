from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grit.config import GRITConfig, Variant
from grit.preconditioner import DampedFactors
from grit.preconditioning import anisotropy, compare, eigenbasis, inverse_power
from grit.products import LoraMatrix, Roots, multiply
from grit.variants import VARIANTS
from tests.support.factors import covariance, whole


def inverses(factors: torch.Tensor, power: float, damping: float) -> Roots:
    return inverse_power(factors, power, damping, whole(factors))


def test_natural_gradient_by_brute_force() -> None:
    """Where x is white and independent of u, the Fisher block of A is S_u (x) I and that of B S_g (x) S_h exactly."""
    rank, width, d_out = 3, 4, 5
    generator = torch.Generator().manual_seed(1)
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * width)  # all signs: E[x x^T] = I exactly
    u = torch.randn(7, rank, generator=generator)
    samples = [torch.kron(u_row, x) for u_row in u for x in corners]
    fisher = sum(torch.outer(sample, sample) for sample in samples) / len(samples)
    gradient = torch.randn(rank, width, generator=generator)
    natural = torch.linalg.solve(fisher.double(), gradient.flatten().double()).reshape(rank, width).float()
    sigma_u = (u.mT @ u / len(u)).unsqueeze(0)
    root = inverses(sigma_u, 1.0, 1e-9).matrices
    ours = multiply(root, gradient.unsqueeze(0), matrix="A")[0]
    torch.testing.assert_close(ours, natural, rtol=1e-5, atol=1e-5)

    g = torch.eye(d_out) * d_out**0.5  # white: E[g g^T] = I exactly
    h = torch.randn(6, rank, generator=generator)
    samples = [torch.kron(g_row, h_row) for g_row in g for h_row in h]
    fisher = sum(torch.outer(sample, sample) for sample in samples) / len(samples)
    gradient = torch.randn(d_out, rank, generator=generator)
    natural = torch.linalg.solve(fisher.double(), gradient.flatten().double()).reshape(d_out, rank).float()
    root = inverses((h.mT @ h / len(h)).unsqueeze(0), 1.0, 1e-9).matrices
    ours = multiply(root, gradient.unsqueeze(0), matrix="B")[0]
    torch.testing.assert_close(ours, natural, rtol=1e-4, atol=1e-5)


def test_the_step_of_the_product_does_not_depend_on_the_basis() -> None:
    """Under (B, A) -> (B Q^-1, Q A) the first-order change of B A stays; with the swapped pairing it does not.

    At next to no damping, in float64.
    """
    rank, d_in, d_out = 3, 6, 5
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    a, b = random(rank, d_in), random(d_out, rank)
    x, g = random(40, d_in), random(40, d_out)
    q = random(rank, rank) + 2 * torch.eye(rank, dtype=torch.float64)

    def change(a: torch.Tensor, b: torch.Tensor, variant: Variant) -> torch.Tensor:
        h, u = x @ a.mT, g @ b
        grad_a, grad_b = u.mT @ x / 40, g.mT @ h / 40
        sigmas = {"sigma_h": (h.mT @ h / 40)[None], "sigma_u": (u.mT @ u / 40)[None]}
        group: Any = SimpleNamespace(**sigmas, ranks=torch.tensor([rank]))
        for_a, for_b = VARIANTS[variant].multipliers(
            DampedFactors(group, GRITConfig(variant, power=1.0, kfac_damping=1e-12))
        )
        step_a = multiply(for_a.matrices, grad_a.unsqueeze(0), matrix="A")[0]
        step_b = multiply(for_b.matrices, grad_b.unsqueeze(0), matrix="B")[0]
        return step_b @ a + b @ step_a

    transformed = b @ torch.linalg.inv(q), q @ a
    torch.testing.assert_close(change(q @ a, transformed[0], "kfac"), change(a, b, "kfac"), rtol=1e-8, atol=1e-8)
    published = change(a, b, "published")
    assert (change(q @ a, transformed[0], "published") - published).norm() > 0.05 * published.norm()


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(1, 5),
    rank=st.integers(1, 8),
    width=st.integers(1, 12),
    matrix=st.sampled_from(["A", "B"]),
    power=st.sampled_from([0.5, 1.0]),
    norm_match=st.booleans(),
    seed=st.integers(0, 99),
)
def test_figures_are_those_of_the_product(
    count: int, rank: int, width: int, matrix: LoraMatrix, power: float, norm_match: bool, seed: int
) -> None:
    shape = (count, rank, width) if matrix == "A" else (count, width, rank)
    raw = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    roots = inverses(covariance(count, rank, seed), power, 0.03).matrices
    figures = compare(roots, raw, matrix=matrix, norm_match=norm_match)
    product = multiply(figures.roots, raw, matrix=matrix)
    torch.testing.assert_close(figures.raw_squared, raw.square().sum(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(figures.squared, product.square().sum(), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(figures.inner, (raw * product).sum(), rtol=1e-3, atol=1e-6)
    assert float(figures.inner) > 0, "a positive definite matrix keeps the descent direction"
    if norm_match:
        norms = [torch.linalg.vector_norm(gradients, dim=(1, 2)) for gradients in (product, raw)]
        torch.testing.assert_close(*norms, rtol=1e-3, atol=1e-6)


def test_a_half_power_twice_is_the_whole() -> None:
    factors = covariance(3, 5, 0)
    half, whole = inverses(factors, 0.5, 0.1).matrices, inverses(factors, 1.0, 0.1).matrices
    torch.testing.assert_close(half @ half, whole, rtol=1e-4, atol=1e-5)
    mean = factors.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    torch.testing.assert_close(whole, torch.linalg.inv(factors + 0.1 * mean * torch.eye(5)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e12])
def test_damping_is_relative(scale: float) -> None:
    plain, scaled = (inverses(s * covariance(2, 4, 1), 0.5, 0.03).matrices for s in (1.0, scale))
    torch.testing.assert_close(scaled * scale**0.5, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_an_empty_or_broken_factor_gives_the_identity(value: float) -> None:
    factors = covariance(2, 3, 0)
    factors[1] = value
    roots = inverses(factors, 0.5, 0.03)
    assert torch.equal(roots.matrices[1], torch.eye(3))
    assert roots.conditions[1] == 1
    assert torch.isfinite(roots.matrices).all()


def test_anisotropy() -> None:
    matrices = torch.stack([3 * torch.eye(2), torch.diag(torch.tensor([1.0, 0.0]))])
    assert anisotropy(matrices, whole(matrices)).tolist() == pytest.approx([0, 0.5**0.5])
    assert anisotropy(matrices, torch.tensor([1, 1])).tolist() == [0, 0], "one direction that is left has no other"


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_what_is_cut_changes_nothing_of_the_rest(rank: int) -> None:
    """Matrices, damping and condition numbers are those of the factor of the directions that are left, alone."""
    small = covariance(2, rank, 7)
    padded, ranks = torch.zeros(2, 5, 5), torch.tensor([rank, rank])
    padded[:, :rank, :rank] = small
    for of_padded, of_small in (
        (inverse_power(padded, 0.5, 0.03, ranks), inverses(small, 0.5, 0.03)),
        (eigenbasis(padded, 0.03, ranks), eigenbasis(small, 0.03, whole(small))),
    ):
        torch.testing.assert_close(of_padded.conditions, of_small.conditions, rtol=1e-4, atol=0)
    block, alone = inverse_power(padded, 0.5, 0.03, ranks).matrices, inverses(small, 0.5, 0.03).matrices
    torch.testing.assert_close(block[:, :rank, :rank], alone, rtol=1e-4, atol=1e-5 * float(alone.max()))


def test_matched_norms_do_not_overflow() -> None:
    """Gradients are tiny where a model is nearly right, and at power 1 their factor's inverse is huge."""
    gradients = torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(0))
    result = compare(inverses(1e-25 * covariance(1, 3, 0), 1.0, 0.03).matrices, gradients, matrix="A", norm_match=True)
    product = multiply(result.roots, gradients, matrix="A")
    torch.testing.assert_close(product.norm(), gradients.norm())
