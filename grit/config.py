"""Settings of GRIT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from grit.variants import VARIANTS, GritVariant

Variant = Literal["adamw", "kfac", "eigen_adam", "graft", "riemannian", "published"]
"""Names of the rows of `VARIANTS`."""
Basis = Literal["initial", "gradient", "whitened_gradient"]
Throttle = int | Callable[[int], int]
"""A number, or a function from the optimizer step to it."""
_LEAST = {"kfac_update_freq": 1, "cov_update_freq": 1, "ng_warmup_steps": 0}
"""What a throttle must not fall below."""


@dataclass(frozen=True)
class GRITConfig:
    """What GRIT does, and when.

    Raises:
        ValueError: a value that cannot work, naming the field.
    """

    variant: Variant = "kfac"
    """What is preconditioned, and how: a row of `grit.variants.VARIANTS`."""
    power: float = 0.5
    """Exponent p of the inverse factors, in (0, 1]: 1 is K-FAC, 0.5 its square root."""
    norm_match: bool = True
    """Give each preconditioned gradient the Frobenius norm of the raw one."""
    kfac_update_freq: Throttle = 10
    """Optimizer steps between two factorisations."""
    cov_update_freq: Throttle = 5
    """Optimizer steps between two updates of the factors."""
    kfac_damping: float = 0.03
    """Damping relative to the mean eigenvalue of each factor."""
    kfac_min_samples: int = 16
    """Real tokens that a module must have seen before its factors are used."""
    kfac_ema: float = 0.95
    """Decay of the moving average of the factors, in [0, 1)."""
    ng_warmup_steps: Throttle = 0
    """Optimizer steps before the preconditioner is switched on."""
    basis: Basis | None = None
    """Where A starts. `initial`: as PEFT made it. `gradient`: the top right singular vectors of the mean gradient of W
    over the first rows. `whitened_gradient`: the same with inputs and output gradients scaled to unit variance. None:
    `initial` with a variant that only measures, else `gradient`."""
    basis_steps: int = 1
    """Optimizer steps' worth of rows that the basis is computed from; each row is used three times."""
    reprojection_freq: int = 0
    """Optimizer steps between two reprojections of A and B onto the balanced basis of rank space; 0 for none."""
    rank_adaptation_threshold: float = 1.0
    """Share of the energy that a reprojection keeps, in (0, 1]; 1 keeps the rank."""
    min_lora_rank: int = 1
    """No module's rank falls below this."""

    def __post_init__(self) -> None:
        bounds = {
            "variant": self.variant in VARIANTS,
            "power": 0 < self.power <= 1,
            "kfac_damping": self.kfac_damping > 0,
            "kfac_min_samples": self.kfac_min_samples >= 1,
            "kfac_ema": 0 <= self.kfac_ema < 1,
            "basis": self.basis is None or self.basis in get_args(Basis),
            "basis_steps": self.basis_steps >= 1,
            "reprojection_freq": self.reprojection_freq >= 0,
            "rank_adaptation_threshold": 0 < self.rank_adaptation_threshold <= 1,
            "min_lora_rank": self.min_lora_rank >= 1,
        }
        for name, least in _LEAST.items():
            throttle = getattr(self, name)
            bounds[name] = callable(throttle) or throttle >= least
        for name, holds in bounds.items():
            if not holds:
                raise ValueError(f"GRITConfig.{name}: {getattr(self, name)!r} is out of bounds")
        if self.rank_adaptation_threshold < 1 and not self.reprojection_freq:
            raise ValueError("GRITConfig.rank_adaptation_threshold: needs reprojection_freq, 0 means never")
        if self.reprojection_freq and self.variant_row.is_basis:
            raise ValueError(
                f"GRITConfig.reprojection_freq: {self.variant} has a basis of its own; choose one of the two"
            )
        if self.reprojection_freq and self.variant_row.only_measures:
            raise ValueError(
                f"GRITConfig.reprojection_freq: the variant {self.variant} only measures, and this changes A and B"
            )

    @property
    def variant_row(self) -> GritVariant:
        """What the variant is."""
        return VARIANTS[self.variant]

    @property
    def first_basis(self) -> Basis:
        """Where A starts, with `basis` resolved."""
        return self.basis or ("initial" if self.variant_row.only_measures else "gradient")

    def at(self, name: str, step: int) -> int:
        """The value of a throttle at an optimizer step.

        Args:
            name: of the field.
            step: optimizer steps so far.

        Raises:
            ValueError: a function gave a number that is too small.
        """
        throttle: Throttle = getattr(self, name)
        if not callable(throttle):
            return throttle
        value = throttle(step)
        if value < _LEAST[name]:
            raise ValueError(
                f"GRITConfig.{name}: the function gave {value!r} at step {step}, {_LEAST[name]} is the least"
            )
        return value
