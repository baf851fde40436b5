"""Settings of GRIT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class GRITConfig:
    """What the K-FAC preconditioner in LoRA's rank space does, and when.

    Raises:
        ValueError: a value that cannot work, naming the field.
    """

    variant: Literal["kfac", "adamw"] = "kfac"
    """`kfac` preconditions; `adamw` measures the same factors and leaves every gradient as it is."""
    power: float = 0.5
    """Exponent p of the inverse factors, in (0, 1]: 1 is K-FAC, 0.5 its square root."""
    norm_match: bool = True
    """Give each preconditioned gradient the Frobenius norm of the raw one."""
    kfac_update_freq: int = 10
    """Optimizer steps between two factorisations."""
    cov_update_freq: int = 1
    """Optimizer steps between two updates of the factors."""
    kfac_damping: float = 0.03
    """Damping relative to the mean eigenvalue of each factor."""
    kfac_min_samples: int = 16
    """Real tokens that a module must have seen before its factors are used."""
    kfac_ema: float = 0.95
    """Decay of the moving average of the factors, in [0, 1)."""
    ng_warmup_steps: int = 0
    """Optimizer steps before the preconditioner is switched on."""

    def __post_init__(self) -> None:
        bounds = {
            "variant": self.variant in ("kfac", "adamw"),
            "power": 0 < self.power <= 1,
            "kfac_update_freq": self.kfac_update_freq >= 1,
            "cov_update_freq": self.cov_update_freq >= 1,
            "kfac_damping": self.kfac_damping > 0,
            "kfac_min_samples": self.kfac_min_samples >= 1,
            "kfac_ema": 0 <= self.kfac_ema < 1,
            "ng_warmup_steps": self.ng_warmup_steps >= 0,
        }
        for name, holds in bounds.items():
            if not holds:
                raise ValueError(f"GRITConfig.{name}: {getattr(self, name)!r} is out of bounds")
