"""The figures of one optimizer step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from grit.preconditioner import Preconditioner
from grit.preconditioning import Comparison
from grit.variants import GritVariant


def step_figures(
    results: Sequence[Comparison],
    preconditioners: Sequence[Preconditioner],
    variant: GritVariant,
    gradient_scale: float,
) -> dict[str, float]:
    """Reduce what is known of a step, with a single transfer from the device.

    Args:
        results: of the gradients, at least one.
        preconditioners: of all modules.
        variant: of GRIT.
        gradient_scale: what the gradients were still multiplied by.

    Returns:
        `grad_norm` and `grad_norm_preconditioned` of all LoRA gradients (of the unscaled loss), their `norm_ratio` and
        the `cosine` between the two, `in_use` (share of modules with factors in use), `condition_a` and `condition_b`
        (largest condition number of the damped factors applied to A and to B), `tokens` (real tokens seen by the module
        that saw most), `rank` (mean over the modules). A variant that changes only updates is compared as if
        it came before the optimizer. One whose multipliers are a basis has no `cosine`.
    """
    device = results[0].inner.device
    factors = [preconditioner.factors for preconditioner in preconditioners]
    raw, new, inner = (
        torch.stack([getattr(result, name).to(device) for result in results]).sum()
        for name in ("raw_squared", "squared", "inner")
    )
    if variant.only_measures:
        new = inner = raw
    tiny = torch.finfo(raw.dtype).tiny
    figures = {
        "grad_norm": raw.sqrt() / gradient_scale,
        "grad_norm_preconditioned": new.sqrt() / gradient_scale,
        "norm_ratio": (new / raw.clamp_min(tiny)).sqrt(),
        "cosine": inner / (raw.sqrt() * new.sqrt()).clamp_min(tiny),
        "in_use": torch.cat([group.in_use.to(device) for group in preconditioners]).float().mean(),
        "condition_a": torch.stack([group.condition_a.max().to(device) for group in preconditioners]).max(),
        "condition_b": torch.stack([group.condition_b.max().to(device) for group in preconditioners]).max(),
        "tokens": torch.stack([factor.samples.max().to(device) for factor in factors]).max(),
        "rank": torch.cat([factor.ranks.to(device) for factor in factors]).float().mean(),
    }
    if variant.is_basis:
        del figures["cosine"]
    return dict(zip(figures, torch.stack(list(figures.values())).tolist(), strict=True))
