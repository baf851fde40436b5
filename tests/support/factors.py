"""GRIT's factors: a manager's, made-up ones, and whether two are the same."""

from __future__ import annotations

import torch
from torch import Tensor

from grit import GRITManager


def factors(manager: GRITManager) -> dict[str, Tensor]:
    """Factors after one captured step."""
    manager.update_and_invert_factors()
    (group,) = manager.factor_groups
    return {"h": group.sigma_h, "u": group.sigma_u, "samples": group.samples}


def assert_same(wanted: dict[str, Tensor], actual: dict[str, Tensor]) -> None:
    """To 1e-3 of each value and 1e-5 of the largest of its matrix: those of u are 1e-7 and less in some modules."""
    assert wanted.keys() == actual.keys()
    for name, matrices in wanted.items():
        for actual_matrix, matrix in zip(actual[name], matrices, strict=True):
            torch.testing.assert_close(actual_matrix, matrix, rtol=1e-3, atol=1e-5 * float(matrix.abs().max()))


def covariance(count: int, rank: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(count, 3 * rank, rank, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return x.mT @ x / (3 * rank)


def whole(factors: torch.Tensor) -> torch.Tensor:
    """Ranks of which nothing has been cut."""
    return torch.full(factors.shape[:1], factors.shape[-1])
