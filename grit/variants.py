"""GRIT's variants: one table, whose rows say all that a variant is. The rest of GRIT asks the row.

To add a variant, add a row, and its name to `grit.config.Variant`. The settings read this table on the command line, so
torch is loaded only when a function of a row is called. Of the project it imports next to nothing, so that a stage that
only names a variant has no other code of GRIT in its cache key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from grit.products import LoraMatrix, Roots, multiply

if TYPE_CHECKING:
    from torch import Tensor


class Pair(Protocol):
    """One LoRA module."""

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        """A and B."""


class Curvature(Protocol):
    """What is known of M modules of rank r, and what can be computed from it."""

    sigma_h: Tensor
    """E[h h^T], [M, r, r], float32."""
    sigma_u: Tensor
    """E[u u^T], [M, r, r], float32."""

    @property
    def modules(self) -> Sequence[Pair]:
        """The modules, in the order of the stacks."""

    def inverse_power(self, matrices: Tensor) -> Roots:
        """F of each: the damped inverse power."""

    def eigenbasis(self, matrices: Tensor) -> Roots:
        """U of each: the eigenvectors, as columns."""


class UpdateRule(Protocol):
    """Makes the optimizer's updates of several A, or of several B, anew."""

    def __call__(self, roots: Tensor, *, updates: list[Tensor], momenta: list[Tensor], matrix: LoraMatrix) -> Tensor:
        """Compute the new updates.

        Args:
            roots: what the variant's gradients are multiplied by, [M, r, r], float32; the identity where that is off.
            updates: what the optimizer's step added to each weight.
            momenta: Adam's first moment of each weight.
            matrix: whether the weights are A ([r, d_in]) or B ([d_out, r]).

        Returns:
            A stack of the new updates, float32.
        """


@dataclass(frozen=True)
class GritVariant:
    """What a variant does with gradients, and with what the optimizer makes of them.

    Raises:
        ValueError: the fields contradict each other.
    """

    multipliers: Callable[[Curvature], tuple[Roots, Roots]]
    """Of the modules of one rank: what A's gradients are multiplied by from the left, and B's from the right."""
    changes_gradient: bool = True
    """Whether the optimizer gets the product in place of the gradient."""
    new_updates: UpdateRule | None = None
    """Makes the optimizer's updates anew after its step; none where they stay."""
    is_basis: bool = False
    """Whether the multipliers are orthonormal, so that the product is the gradient in another basis. Adam's moments
    then follow the basis. The product has the gradient's norm, and no cosine with it. There is no reprojection onto a
    second basis."""

    def __post_init__(self) -> None:
        if self.is_basis and not (self.changes_gradient and self.new_updates):
            raise ValueError("a variant that turns gradients into another basis must turn the updates back")

    @property
    def only_measures(self) -> bool:
        """Whether the training is the same as without GRIT."""
        return not self.changes_gradient and self.new_updates is None

    @property
    def acts_on_optimizer(self) -> bool:
        """Whether it needs the optimizer, whose updates (and, with a basis, moments) it changes."""
        return self.new_updates is not None


def kfac_roots(curvature: Curvature) -> tuple[Roots, Roots]:
    """f(S_u) and f(S_h), K-FAC's pairing."""
    return curvature.inverse_power(curvature.sigma_u), curvature.inverse_power(curvature.sigma_h)


def swapped_roots(curvature: Curvature) -> tuple[Roots, Roots]:
    """f(S_h) and f(S_u), the pairing of arXiv 2601.00231."""
    return curvature.inverse_power(curvature.sigma_h), curvature.inverse_power(curvature.sigma_u)


def riemannian_roots(curvature: Curvature) -> tuple[Roots, Roots]:
    """f(B^T B) and f(A A^T), to which K-FAC reduces where E[g g^T] and E[x x^T] are multiples of the identity."""
    import torch

    pairs = [[weight.detach().float() for weight in module.weights] for module in curvature.modules]
    of_a, of_b = torch.stack([a @ a.mT for a, _ in pairs]), torch.stack([b.mT @ b for _, b in pairs])
    return curvature.inverse_power(of_b), curvature.inverse_power(of_a)


def eigenvectors(curvature: Curvature) -> tuple[Roots, Roots]:
    """U_u^T and U_h, the eigenvectors of S_u and S_h."""
    for_a, for_b = curvature.eigenbasis(curvature.sigma_u), curvature.eigenbasis(curvature.sigma_h)
    return Roots(for_a.matrices.mT, for_a.conditions), for_b


def turned_back(roots: Tensor, *, updates: list[Tensor], momenta: list[Tensor], matrix: LoraMatrix) -> Tensor:
    """Write the optimizer's updates in the basis of the weights again."""
    import torch

    return multiply(roots.mT, torch.stack(updates).float(), matrix=matrix)


def grafted(roots: Tensor, *, updates: list[Tensor], momenta: list[Tensor], matrix: LoraMatrix) -> Tensor:
    """Multiply Adam's momentum, and give the result the length of Adam's own update."""
    import torch

    new = multiply(roots, torch.stack(momenta).float(), matrix=matrix)
    lengths = torch.linalg.vector_norm(new, dim=(1, 2)).clamp_min(torch.finfo(new.dtype).tiny)
    target = torch.stack(torch._foreach_norm(updates)).float()
    new *= -(target / lengths)[:, None, None]
    identity = torch.eye(roots.shape[-1], device=roots.device)
    unused = (roots == identity).all(-1).all(-1) | (target == 0)
    for index in unused.nonzero().flatten().tolist():
        new[index] = updates[index]
    return new


VARIANTS: dict[str, GritVariant] = {
    # measures, and changes nothing
    "adamw": GritVariant(kfac_roots, changes_gradient=False),
    # rank-space K-FAC before the optimizer
    "kfac": GritVariant(kfac_roots),
    # Adam in the eigenbasis of the factors, after SOAP (arXiv 2409.11321)
    "eigen_adam": GritVariant(eigenvectors, new_updates=turned_back, is_basis=True),
    # K-FAC on Adam's momentum, with the length of Adam's step (arXiv 2002.11803)
    "graft": GritVariant(kfac_roots, changes_gradient=False, new_updates=grafted),
    # (B^T B)^-1 and (A A^T)^-1 in place of the factors (arXiv 2402.02347)
    "riemannian": GritVariant(riemannian_roots),
    # the factors swapped as in arXiv 2601.00231, to compare with
    "published": GritVariant(swapped_roots),
}
"""The variants by the name that the setting `variant` has for them."""
