"""Proof that GRIT is on: the errors that end a training in which it would do nothing."""

from __future__ import annotations

from collections.abc import Sequence

from grit.preconditioning import Roots, anisotropy

ISOTROPIC = 1e-6
"""Below this relative distance from a multiple of the identity a preconditioner does nothing but scale."""


class GritInactiveError(RuntimeError):
    """GRIT is configured and does nothing; the message says why."""


def check_hooks(tokens: float) -> None:
    """Check that the captured steps of an update period were seen.

    Args:
        tokens: real tokens seen since the last check by the module that saw most.

    Raises:
        GritInactiveError: none was.
    """
    if tokens == 0:
        raise GritInactiveError(
            "GRIT's hooks saw no token in a whole step: the LoRA modules are bypassed (fused kernels such as "
            "Unsloth's do so), or another adapter was made active. Train with plain Transformers and PEFT modules, and "
            "make the manager after `set_adapter`."
        )


def check_effect(steps: int, samples: float, needed: int, roots: Sequence[Roots]) -> None:
    """Check, some update periods into the training, that some gradient changes its direction.

    Args:
        steps: optimizer steps so far.
        samples: real tokens seen by the module that saw most.
        needed: `kfac_min_samples`.
        roots: what gradients are multiplied by.

    Raises:
        GritInactiveError: no factor is ready, or all are multiples of the identity.
    """
    if samples < needed:
        raise GritInactiveError(
            f"after {steps} steps no factor is ready: {samples:.0f} tokens seen, kfac_min_samples is {needed}"
        )
    if max(float(anisotropy(root.matrices).max()) for root in roots) < ISOTROPIC:
        raise GritInactiveError(
            f"after {steps} steps the preconditioner is a multiple of the identity in every module, so it changes no "
            "direction: the rank is 1, or kfac_damping is far above the factors' eigenvalues"
        )


def check_steps(missed: int, allowed: int) -> None:
    """Check that the manager is called whenever the optimizer steps.

    Args:
        missed: optimizer steps since the manager's last.
        allowed: how many are tolerated.

    Raises:
        GritInactiveError: too many.
    """
    if missed >= allowed:
        raise GritInactiveError(
            f"the optimizer has stepped {missed} times without GRITManager.step(): train with GritTrainer, give the "
            "trainer a GritCallback, or call it from optimizer.register_step_pre_hook"
        )


def check_updates(missed: int, allowed: int) -> None:
    """Check that the factors are updated, and not only used.

    Args:
        missed: steps of preconditioning since the last update.
        allowed: how many are tolerated.

    Raises:
        GritInactiveError: too many.
    """
    if missed >= allowed:
        raise GritInactiveError(
            f"{missed} steps without GRITManager.update_and_invert_factors(): call it before precondition_gradients(), "
            "or call step(), which is both"
        )
