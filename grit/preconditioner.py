"""The preconditioner of all modules of one rank: its matrices, kept between factorisations, and their application."""

from __future__ import annotations

import torch
from torch import Tensor

from grit.config import GRITConfig
from grit.factors import FactorGroup
from grit.modules import LoraModule, by_shape
from grit.optimizer import AttachedOptimizer
from grit.preconditioning import Comparison, anisotropy, compare, eigenbasis, inverse_power
from grit.products import LoraMatrix, Roots, multiply
from grit.variants import UpdateRule

STATE = ("root_a", "condition_a", "root_b", "condition_b", "ready", "in_use", "used_a", "used_b")


class DampedFactors:
    """What a variant computes its multipliers from, see `grit.variants.Curvature`.

    Args:
        factors: of the modules of one rank.
        config: power and damping.
    """

    def __init__(self, factors: FactorGroup, config: GRITConfig) -> None:
        self._factors, self._config = factors, config
        self.sigma_h, self.sigma_u = factors.sigma_h, factors.sigma_u

    @property
    def modules(self) -> list[LoraModule]:
        """The modules, in the order of the stacks."""
        return self._factors.modules

    def inverse_power(self, matrices: Tensor) -> Roots:
        """The damped inverse power of each."""
        return inverse_power(matrices, self._config.power, self._config.kfac_damping, self._factors.ranks)

    def eigenbasis(self, matrices: Tensor) -> Roots:
        """The eigenvectors of each, as columns."""
        return eigenbasis(matrices, self._config.kfac_damping, self._factors.ranks)


class Preconditioner:
    """Multiplies gradients, or the optimizer's updates, of M modules of rank r.

    Args:
        factors: of the same modules.
    """

    def __init__(self, factors: FactorGroup, config: GRITConfig) -> None:
        self.factors, self.config = factors, config
        identity = torch.eye(factors.mean_h.shape[-1], device=factors.mean_h.device).expand_as(factors.mean_h)
        ones = torch.ones(len(factors.modules), device=identity.device)
        self.root_a, self.root_b = identity.clone(), identity.clone()
        """What A's gradient is multiplied by from the left and B's from the right, [M, r, r], float32."""
        self.condition_a, self.condition_b = ones, ones.clone()
        """Condition numbers of the damped factors behind them, [M]."""
        self.ready = torch.zeros_like(ones, dtype=torch.bool)
        """Modules that had seen enough tokens at the last factorisation, [M]."""
        self.in_use = self.ready.clone()
        """Modules whose factors are in use, [M]: they are ready, and GRIT is switched on."""
        self.used_a, self.used_b = identity.clone(), identity.clone()
        """As `root_a` and `root_b`, and the identity where they are not in use."""

    def follow_modules(self) -> None:
        """Move all tensors to where the modules are, should the model have been moved since.

        Raises:
            ValueError: they were spread over several devices.
        """
        devices = {module.lora_a.weight.device for module in self.factors.modules}
        if len(devices) > 1:
            raise ValueError(
                f"the model was spread over {', '.join(sorted(map(str, devices)))} after GRITManager was made: make it "
                "after `device_map` or `dispatch_model`"
            )
        (device,) = devices
        if self.root_a.device != device:
            self.factors.follow(device)
            for name in STATE:
                setattr(self, name, getattr(self, name).to(device))

    def renew(self) -> None:
        """Compute the matrices anew from the factors."""
        for_a, for_b = self.config.variant_row.multipliers(DampedFactors(self.factors, self.config))
        # Contiguous as they are after a checkpoint: the layout decides the last bits of a product.
        self.root_a, self.root_b = for_a.matrices.contiguous(), for_b.matrices.contiguous()
        self.condition_a, self.condition_b = for_a.conditions, for_b.conditions
        self.ready = self.factors.samples >= self.config.kfac_min_samples

    def use(self, on: bool, attached: AttachedOptimizer | None) -> None:
        """Put the matrices in use where the modules are ready, after `renew` or when GRIT is switched on.

        Args:
            on: use them at all.
            attached: the optimizer, whose moments follow the matrices where they are a basis.
        """
        identity = torch.eye(self.root_a.shape[-1], device=self.root_a.device)
        self.in_use = self.ready & on
        chosen = self.in_use[:, None, None]
        new_a, new_b = (torch.where(chosen, root, identity).contiguous() for root in (self.root_a, self.root_b))
        if self.config.variant_row.is_basis and attached:
            turns = (new_a @ self.used_a.mT, self.used_b.mT @ new_b)
            for index, module in enumerate(self.factors.modules):
                attached.change_basis(module.lora_a.weight, turns[0][index], matrix="A")
                attached.change_basis(module.lora_b.weight, turns[1][index], matrix="B")
        self.used_a, self.used_b = new_a, new_b

    def effects(self) -> list[Tensor]:
        """How far what is in use is from changing no direction, for A and for B, [M] each."""
        return [anisotropy(used, self.factors.ranks) for used in (self.used_a, self.used_b)]

    def precondition(self, write: bool) -> list[Comparison]:
        """Multiply the gradients, with one batched product for all modules of a shape.

        Args:
            write: change the gradients, rather than only measure.
        """
        results = []
        norm_match = self.config.norm_match and not self.config.variant_row.is_basis
        for matrix, used in self._used():
            for indices, parameters in by_shape(self.factors.modules, matrix):
                gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
                chosen = used if len(indices) == len(used) else used[indices]
                stacked = torch.stack(gradients).float()
                result = compare(chosen, stacked, matrix=matrix, norm_match=norm_match)
                if write:
                    torch._foreach_copy_(gradients, list(multiply(result.roots, stacked, matrix=matrix).unbind()))
                results.append(result)
        return results

    def rewrite_updates(self, new_updates: UpdateRule, attached: AttachedOptimizer) -> None:
        """After the optimizer's step: put other updates in the place of its own.

        Args:
            new_updates: the variant's.
            attached: the optimizer.
        """
        for matrix, used in self._used():
            for indices, parameters in by_shape(self.factors.modules, matrix):
                updates, momenta = attached.updates(parameters), attached.momenta(parameters)
                new = new_updates(used[indices], updates=updates, momenta=momenta, matrix=matrix)
                attached.replace_updates(parameters, list(new.to(updates[0].dtype).unbind()))

    def state_dict(self) -> dict[str, Tensor]:
        """The matrices and those of the factors."""
        return self.factors.state_dict() | {name: getattr(self, name).clone() for name in STATE}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave for the same modules."""
        self.factors.load_state_dict(state)
        for name in STATE:
            setattr(self, name, state[name].to(self.root_a.device, copy=True))

    def memory_bytes(self) -> int:
        """Bytes of all tensors."""
        return self.factors.memory_bytes() + sum(getattr(self, name).nbytes for name in STATE)

    def _used(self) -> tuple[tuple[LoraMatrix, Tensor], tuple[LoraMatrix, Tensor]]:
        """What is in use for A and for B."""
        return ("A", self.used_a), ("B", self.used_b)
