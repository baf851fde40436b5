"""Proof that GRIT is on: the errors that end a training in which it would do nothing."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

NO_EFFECT = 1e-5
"""Below this relative distance from a multiple of the identity a preconditioner does nothing but scale; float32's own
error is some 1e-6 at rank 256."""


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


def check_progress(*, steps: int, samples: float, needed: int, idle: int, allowed: int) -> None:
    """Check that the factors will be ready some time.

    Args:
        steps: optimizer steps so far.
        samples: real tokens in the factors of the module that saw most.
        needed: `kfac_min_samples`.
        idle: steps since their number last grew.
        allowed: how many are tolerated.

    Raises:
        GritInactiveError: no factor is ready, and none will be.
    """
    if samples < needed and idle >= allowed:
        raise GritInactiveError(
            f"after {steps} steps no factor is ready: {samples:.0f} tokens seen, kfac_min_samples is {needed}, "
            f"and none came in for {idle} steps: every gradient overflowed"
        )


def check_effect(steps: int, effects: Sequence[Tensor]) -> None:
    """Check, some update periods into the training, that some gradient changes its direction.

    Args:
        steps: optimizer steps so far.
        effects: relative distances of what gradients are multiplied by from what changes nothing, [M] each.

    Raises:
        GritInactiveError: none has an effect.
    """
    if max(float(of_modules.max()) for of_modules in effects) < NO_EFFECT:
        raise GritInactiveError(
            f"after {steps} steps the preconditioner is a multiple of the identity in every module, so it changes no "
            "direction: the rank is 1 or was cut to it, or kfac_damping is far above the factors' eigenvalues"
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


def check_attached(others: int) -> None:
    """Check that what acts on the optimizer acts on the one that trains.

    Args:
        others: steps of other optimizers than the attached one.

    Raises:
        GritInactiveError: there were some.
    """
    if others:
        raise GritInactiveError(
            "another optimizer than the attached one has stepped LoRA's weights, so the variant or reprojection does "
            "nothing: call GRITManager.attach(optimizer) with the one that trains them"
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


def check_gradients(count: int) -> None:
    """Check that there is something to precondition.

    Args:
        count: LoRA weights with a gradient.

    Raises:
        GritInactiveError: none.
    """
    if count == 0:
        raise GritInactiveError(
            "no LoRA weight has a gradient: call GRITManager.step() after backward() and before zero_grad(). Gradients "
            "that are kept elsewhere (FSDP, DeepSpeed) are not handled"
        )


def check_order(changed: bool) -> None:
    """Check that gradients are preconditioned before they are used.

    Args:
        changed: whether the weights have changed since the forward pass.

    Raises:
        GritInactiveError: they have.
    """
    if changed:
        raise GritInactiveError(
            "the LoRA weights have changed since the last forward pass of the model that GRITManager was given: call "
            "GRITManager.step() before optimizer.step(), not after it"
        )
