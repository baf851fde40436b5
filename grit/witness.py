"""Who sees whether a training uses GRIT: of the optimizer's steps by the weights, and of the tokens by module."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from grit.config import GRITConfig
from grit.factors import FactorGroup
from grit.modules import LoraModule
from grit.proof import check_hooks, check_order, check_progress, check_steps

logger = logging.getLogger(__name__)
PERIODS = 2
"""Update periods that something may take before it is reported."""


class StepWitness:
    """Tells whether the weights have been stepped: by PyTorch's optimizers, or by any other change in place.

    The second shows in the versions of the weights. Fused kernels and bitsandbytes do not raise those, so that the
    first needs a hook, which PyTorch calls after the step of any optimizer.

    Args:
        modules: whose weights are watched.
    """

    def __init__(self, modules: Sequence[LoraModule]) -> None:
        self._modules = modules
        self.steps = 0
        """Steps of optimizers that hold any of the weights."""
        this = weakref.ref(self)  # PyTorch keeps the hook, and the model must not live on by it

        def after_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
            witness = this()
            if witness is not None:
                witness._see_optimizer(optimizer)

        self._handle = register_optimizer_step_post_hook(after_step)
        weakref.finalize(self, self._handle.remove)
        self._missed = 0
        """Optimizer steps without the manager."""
        self._seen = self._versions()
        self._at_forward: list[int] | None = None

    def see_forward(self, allowed: int) -> None:
        """Before a forward pass with gradients.

        Args:
            allowed: optimizer steps without the manager that are tolerated.

        Raises:
            GritInactiveError: there were more.
        """
        versions = self._versions()
        if versions != self._seen:
            self._missed += 1
            check_steps(self._missed, allowed)
        self._seen = self._at_forward = versions

    def see_step(self) -> None:
        """At the manager's step.

        Raises:
            GritInactiveError: the optimizer has stepped before it.
        """
        versions = self._versions()
        check_order(self._at_forward is not None and versions != self._at_forward)
        self._missed, self._seen = -1, versions

    def forget(self) -> None:
        """After weights were changed by something else than the optimizer."""
        self._seen = self._versions()

    def close(self) -> None:
        """Remove the hook."""
        self._handle.remove()

    def _see_optimizer(self, optimizer: Optimizer) -> None:
        own = {id(weight) for weight in self._weights()}
        self.steps += any(id(p) in own for group in optimizer.param_groups for p in group["params"])

    def _versions(self) -> list[int]:
        return [self.steps, *(weight._version for weight in self._weights())]

    def _weights(self) -> Iterator[Tensor]:
        for module in self._modules:
            yield from module.weights


class TokenWitness:
    """Tells whether tokens come in, at each factorisation that follows a captured step.

    Args:
        groups: the factors.
    """

    def __init__(self, groups: Sequence[FactorGroup], config: GRITConfig) -> None:
        self._groups, self._config = groups, config
        self._names = [module.name for group in groups for module in group.modules]
        self._captured = [0.0] * len(self._names)
        self._silent = [0] * len(self._names)
        """Periods without a token, by module."""
        self._samples, self._grown = 0.0, -1
        self._warned: set[str] = set()

    def look(self, steps: int) -> None:
        """Compare with the last time.

        Args:
            steps: optimizer steps so far.

        Raises:
            GritInactiveError: no module saw a token; or none is ready, and the tokens in the factors stay as they are.
        """
        captured = [tokens for group in self._groups for tokens in group.captured.tolist()]
        new = [now - before for now, before in zip(captured, self._captured, strict=True)]
        self._captured = captured
        check_hooks(max(new))
        self._silent = [0 if tokens else count + 1 for tokens, count in zip(new, self._silent, strict=True)]
        silent = [name for name, count in zip(self._names, self._silent, strict=True) if count >= PERIODS]
        if silent:
            named = ", ".join([*silent[:3], *(["..."] if silent[3:] else [])])
            self._warn_once(
                "silent",
                f"GRIT's hooks have seen no token of {len(silent)} of {len(self._names)} LoRA modules for {PERIODS} "
                f"update periods, so that it changes nothing there: {named}",
            )
        samples = max(float(group.samples.max()) for group in self._groups)
        if samples > self._samples or self._grown < 0:
            self._samples, self._grown = samples, steps
        if self._config.variant_row.only_measures or steps < PERIODS * self._config.at("kfac_update_freq", steps):
            return
        needed = self._config.kfac_min_samples
        period = max(self._config.at(name, steps) for name in ("kfac_update_freq", "cov_update_freq"))
        check_progress(steps=steps, samples=samples, needed=needed, idle=steps - self._grown, allowed=PERIODS * period)
        if samples < needed:
            self._warn_once(
                "few",
                f"GRIT changes nothing yet after {steps} steps: {samples:.0f} tokens seen, kfac_min_samples is "
                f"{needed}",
            )

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning(message)
