"""When things happen: capture, update, factorise, precondition, once per optimizer step; and proof that they did."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from grit.config import GRITConfig
from grit.factors import FactorGroup, LoraModule
from grit.preconditioning import Preconditioned, Roots, anisotropy, apply, inverse_power

ISOTROPIC = 1e-6
"""Below this relative distance from a multiple of the identity a preconditioner does nothing but scale."""


class GritInactiveError(RuntimeError):
    """GRIT is configured and does nothing; the message says why."""


class GRITManager:
    """K-FAC preconditioner for the LoRA modules of a PEFT model.

    Call `step()` once per optimizer step, on the full accumulated gradient, before clipping. `GritTrainer` does so; in
    a bare loop `optimizer.register_step_pre_hook(lambda *_: manager.step())` is a clean place.

    The factors are per real token: padding is read from the `attention_mask` of the model's own call. Gradients of
    anything but LoRA's A and B (such as `modules_to_save`) are left alone, as are modules without a gradient.

    Args:
        model: a PEFT model with LoRA adapters on linear layers; the active adapters are handled.
        config: the settings.

    Raises:
        ValueError: no LoRA module; DoRA, LoRA on embeddings or convolutions; more than one process.
    """

    def __init__(self, model: nn.Module, config: GRITConfig | None = None) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_world_size() > 1:
            raise ValueError("GRIT runs in one process only: its factors are not summed over processes")
        self.config = config or GRITConfig()
        self.loss_denominator: float | Tensor = 1.0
        """What the summed loss was divided by, e.g. the supervised tokens of the accumulated batch; set per step."""
        self.loss_scale: float = 1.0
        """The gradient scaler's factor; set per step under float16."""
        self.last_diagnostics: dict[str, float] = {}
        """Figures of the last step, see `precondition_gradients`."""
        self.steps = 0
        """Optimizer steps so far."""
        self._mask: Tensor | None = None
        by_rank = defaultdict(list)
        for module in _lora_modules(model):
            by_rank[module.lora_a.out_features, module.lora_a.weight.device].append(module)
        if not by_rank:
            raise ValueError("the model has no LoRA module with an active adapter")
        self._groups = [
            FactorGroup(modules, self.config.kfac_ema, lambda: self._mask, self._captures)
            for modules in by_rank.values()
        ]
        self._roots: list[tuple[Roots, Roots] | None] = [None] * len(self._groups)
        self._witness = self._groups[0].modules[0].lora_b.weight
        self._witness_version, self._missed_steps = self._witness._version, 0
        self._handle = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    @property
    def factors_are_ready(self) -> bool:
        """Whether any module has factors in use."""
        return any(bool(self._ready(group).any()) for group in self._groups)

    def step(self) -> None:
        """Do all that belongs to one optimizer step: update, factorise when due, precondition the gradients.

        Raises:
            GritInactiveError: GRIT would do nothing.
        """
        self.update_and_invert_factors()
        self.precondition_gradients()
        self.steps += 1
        self._missed_steps, self._witness_version = -1, self._witness._version

    def update_and_invert_factors(self) -> None:
        """Take over what was captured and, when due, renew the inverse powers.

        Raises:
            GritInactiveError: the hooks saw no token, or after two update periods nothing would be preconditioned.
        """
        scale = self.loss_scale / self.loss_denominator
        if self._captures():
            for group in self._groups:
                group.update(scale)
        if self.steps % self.config.kfac_update_freq == 0:
            self._roots = [self._invert(group) for group in self._groups]
            self._check_active()

    def precondition_gradients(self) -> None:
        """Precondition the gradients of all modules in place and set `last_diagnostics`.

        Those are: `grad_norm` and `grad_norm_preconditioned` of all LoRA gradients (of the unscaled loss), `cosine`
        between the two, `ready` (share of modules with factors in use), `condition_h` and `condition_u` (largest
        condition number of the damped factors), `tokens` (real tokens seen by the first module).
        """
        on = self.config.variant == "kfac" and self.steps >= self.config.ng_warmup_steps
        results: list[Preconditioned] = []
        for group, roots in zip(self._groups, self._roots, strict=True):
            if roots is not None:
                ready = self._ready(group)
                results += self._precondition(group, roots[1].matrices, ready, left=True, write=on)
                results += self._precondition(group, roots[0].matrices, ready, left=False, write=on)
        self._diagnose(results, on)

    def state_dict(self) -> dict[str, Any]:
        """Factors, counters and the step; the inverse powers are computed anew from the factors."""
        state: dict[str, Any] = {"steps": torch.tensor(self.steps)}
        for index, group in enumerate(self._groups):
            state |= {f"{index}.{name}": tensor for name, tensor in group.state_dict().items()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of a manager of the same model.

        Args:
            state: what `state_dict` gave.
        """
        self.steps = int(state["steps"])
        for index, group in enumerate(self._groups):
            own = {name.split(".", 1)[1]: value for name, value in state.items() if name.startswith(f"{index}.")}
            group.load_state_dict(own)
        self._roots = [self._invert(group) for group in self._groups]

    def memory_bytes(self) -> int:
        """Bytes of factors and inverse powers."""
        roots = sum(r.matrices.numel() * 4 for pair in self._roots if pair is not None for r in pair)
        return roots + sum(group.memory_bytes() for group in self._groups)

    def close(self) -> None:
        """Remove all hooks."""
        self._handle.remove()
        for group in self._groups:
            group.close()

    def _captures(self) -> bool:
        return self.steps % self.config.cov_update_freq == 0

    def _ready(self, group: FactorGroup) -> Tensor:
        return group.samples >= self.config.kfac_min_samples  # [M]

    def _invert(self, group: FactorGroup) -> tuple[Roots, Roots]:
        power, damping = self.config.power, self.config.kfac_damping
        return inverse_power(group.sigma_h, power, damping), inverse_power(group.sigma_u, power, damping)

    def _precondition(
        self, group: FactorGroup, roots: Tensor, ready: Tensor, *, left: bool, write: bool
    ) -> list[Preconditioned]:
        """One batched product for all modules of a shape; modules that are not ready keep their gradient."""
        identity = torch.eye(roots.shape[-1], device=roots.device)
        roots = torch.where(ready[:, None, None], roots, identity)
        by_shape = defaultdict(list)
        for index, module in enumerate(group.modules):
            weight = (module.lora_a if left else module.lora_b).weight
            if weight.grad is not None:
                by_shape[weight.shape, weight.grad.dtype].append((index, weight.grad))
        results = []
        for members in by_shape.values():
            gradients = [gradient for _, gradient in members]
            chosen = roots[[index for index, _ in members]]
            result = apply(chosen, torch.stack(gradients), left=left, norm_match=self.config.norm_match)
            if write:
                torch._foreach_copy_(gradients, list(result.gradients.unbind()))
            results.append(result)
        return results

    def _diagnose(self, results: list[Preconditioned], on: bool) -> None:
        """Reduce the figures of a step with a single transfer from the device."""
        if not results:
            return
        device = results[0].inner.device
        raw = torch.stack([result.raw_squared.to(device) for result in results]).sum()
        new = torch.stack([result.squared.to(device) for result in results]).sum() if on else raw
        inner = torch.stack([result.inner.to(device) for result in results]).sum() if on else raw
        ready = torch.cat([self._ready(group).to(device) for group in self._groups]).float().mean()
        conditions = [
            torch.stack([pair[side].conditions.max().to(device) for pair in self._roots if pair is not None]).max()
            for side in (0, 1)
        ]
        cosine = inner / (raw.sqrt() * new.sqrt()).clamp_min(torch.finfo(torch.float32).tiny)
        names = ("grad_norm", "grad_norm_preconditioned", "cosine", "ready", "condition_h", "condition_u", "tokens")
        figures = torch.stack(
            [
                raw.sqrt() / self.loss_scale,
                new.sqrt() / self.loss_scale,
                cosine,
                ready,
                *conditions,
                self._groups[0].samples[0].to(device),
            ]
        )
        self.last_diagnostics = dict(zip(names, figures.tolist(), strict=True))

    def _check_active(self) -> None:
        seen = max(float(group.samples.max()) for group in self._groups)
        if seen == 0 and self._captures():
            raise GritInactiveError(
                "GRIT's hooks saw no token in a whole step: the LoRA modules are bypassed (fused kernels such as "
                "Unsloth's do so), or the gradients were not finite. Train with plain Transformers and PEFT modules."
            )
        late = self.steps >= max(2 * self.config.kfac_update_freq, self.config.ng_warmup_steps)
        if self.config.variant != "kfac" or not late:
            return
        if seen < self.config.kfac_min_samples:
            raise GritInactiveError(
                f"after {self.steps} steps no factor is ready: {seen:.0f} tokens seen, kfac_min_samples is "
                f"{self.config.kfac_min_samples}"
            )
        strongest = max(float(anisotropy(r.matrices).max()) for pair in self._roots if pair is not None for r in pair)
        if strongest < ISOTROPIC:
            raise GritInactiveError(
                f"after {self.steps} steps the preconditioner is a multiple of the identity in every module, so it "
                "changes no direction: the rank is 1, or kfac_damping is far above the factors' eigenvalues"
            )

    def _before_forward(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember the mask of the model's own call, and notice optimizer steps that passed by the manager."""
        mask = kwargs.get("attention_mask")
        self._mask = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        if torch.is_grad_enabled() and self._witness._version != self._witness_version:
            self._witness_version = self._witness._version
            self._missed_steps += 1
            if self._missed_steps >= 2 * self.config.kfac_update_freq:
                raise GritInactiveError(
                    f"the optimizer has stepped {self._missed_steps} times without GRITManager.step(): train with "
                    "GritTrainer, or call it from optimizer.register_step_pre_hook"
                )


def _lora_modules(model: nn.Module) -> list[LoraModule]:
    modules = []
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        for adapter in layer.active_adapters:
            lora_a = layer.lora_A[adapter] if adapter in layer.lora_A else None  # noqa: SIM401, ModuleDict has no get
            lora_b = layer.lora_B[adapter] if adapter in layer.lora_B else None  # noqa: SIM401
            if not (isinstance(lora_a, nn.Linear) and isinstance(lora_b, nn.Linear)):
                raise ValueError(f"{name}: GRIT handles LoRA on linear layers only")
            if layer.use_dora.get(adapter):
                raise ValueError(f"{name}: GRIT does not handle DoRA, whose magnitude also depends on A and B")
            if lora_a.weight.requires_grad:
                modules.append(LoraModule(f"{name}[{adapter}]", lora_a, lora_b))
    return modules
