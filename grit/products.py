"""What gradients of A and B are multiplied by, and the product. Loads nothing, since the table of variants needs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

LoraMatrix = Literal["A", "B"]
"""A [r, d_in], whose rank space is multiplied from the left, or B [d_out, r], where it is from the right."""


class Roots(NamedTuple):
    """What a stack of gradients is multiplied by: inverse powers of factors, or their eigenvectors."""

    matrices: Tensor
    """[M, r, r], float32; the identity where the factor is empty."""
    conditions: Tensor
    """[M], float32: largest damped eigenvalue over smallest; 1 where the factor is empty."""


def multiply(roots: Tensor, gradients: Tensor, *, matrix: LoraMatrix) -> Tensor:
    """P G of A or G P of B, for a stack of each."""
    return roots.bmm(gradients) if matrix == "A" else gradients.bmm(roots)
