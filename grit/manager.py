"""When things happen: capture, update, factorise, precondition, once per optimizer step; and proof that they did."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from grit.calls import LossDenominator, reader, token_mask
from grit.config import AFTER_OPTIMIZER, BEFORE_OPTIMIZER, GRITConfig, at
from grit.factors import FactorGroup
from grit.modules import LoraModule, lora_modules
from grit.optimizer import AttachedOptimizer
from grit.preconditioner import Preconditioner
from grit.preconditioning import Comparison
from grit.proof import GritInactiveError, check_effect, check_hooks, check_steps, check_updates
from grit.reprojection import reproject


class GRITManager:
    """GRIT for the LoRA modules of a PEFT model.

    Call `step()`, or the two calls that it consists of, once per optimizer step, on the full accumulated gradient,
    before clipping. `GritTrainer` does so, and `GritCallback` in any other trainer; in a bare loop
    `optimizer.register_step_pre_hook(lambda *_: manager.step())` is a clean place. The variants `eigen_adam` and
    `graft`, and reprojection, also need `attach(optimizer)`.

    The factors are per real token: padding is read from the `attention_mask` [batch, length] of the model's own call.
    Gradients of anything but LoRA's A and B (such as `modules_to_save`) are left alone, as are modules without a
    gradient. With several processes the factors are those of all of them.

    Args:
        model: a PEFT model with LoRA adapters on linear layers; the active adapters are handled.
        config: the settings.

    Raises:
        ValueError: no LoRA module; DoRA, LoRA on embeddings or convolutions, sharded weights.
    """

    def __init__(self, model: nn.Module, config: GRITConfig | None = None) -> None:
        self.config = config or GRITConfig()
        self.loss_denominator: float | Tensor = 1.0
        """What the summed loss was divided by, e.g. the supervised tokens of the accumulated batch; with DDP, which
        averages the gradients, that over the number of processes. It is read from `num_items_in_batch` in the model's
        own call, as Transformers' trainer passes it; elsewhere set it per step."""
        self.loss_scale: float = 1.0
        """The gradient scaler's factor; set per step under float16."""
        self.last_diagnostics: dict[str, float] = {}
        """Figures of the last step, see `precondition_gradients`."""
        self.basis_seconds = 0.0
        """Seconds that finding the first basis took, see `grit.basis`."""
        self.steps = 0
        """Optimizer steps so far."""
        self.modules: list[LoraModule] = lora_modules(model)
        """What is handled."""
        by_rank = defaultdict(list)
        for module in self.modules:
            by_rank[module.lora_a.out_features, module.lora_a.weight.device].append(module)
        self._groups = [
            FactorGroup(modules, self.config.kfac_ema, lambda: self._mask, lambda: self._capturing)
            for modules in by_rank.values()
        ]
        self.preconditioners = [Preconditioner(group, self.config) for group in self._groups]
        """One for each rank (and device)."""
        self._mask: Tensor | None = None
        self._capturing, self._on, self._paused = True, False, False
        self._captured_before, self._unchecked, self._last_update = 0.0, False, 0
        self._attached: AttachedOptimizer | None = None
        self._witness = self.modules[0].lora_b.weight
        self._witness_version, self._missed_steps = self._witness._version, 0
        self._read_call, self._of_calls = reader(model), LossDenominator(model)
        self._handle = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    @property
    def factors_are_ready(self) -> bool:
        """Whether any module has seen enough tokens for its factors to be used."""
        return any(bool((group.samples >= self.config.kfac_min_samples).any()) for group in self._groups)

    @property
    def ranks(self) -> dict[str, int]:
        """Directions of rank space in use, by module."""
        names = [module.name for group in self._groups for module in group.modules]
        return dict(zip(names, torch.cat([group.ranks.cpu() for group in self._groups]).tolist(), strict=True))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Ignore, within the context, what the model does: for passes that are no training."""
        capturing, self._capturing, self._paused = self._capturing, False, True
        try:
            yield
        finally:
            self._capturing, self._paused = capturing, False
            self._witness_version = self._witness._version

    def attach(self, optimizer: Any) -> None:
        """Watch the steps of an optimizer. Of use for `eigen_adam`, `graft` and reprojection; harmless otherwise.

        Args:
            optimizer: one that keeps `exp_avg` and `exp_avg_sq`, as torch's AdamW does, or Accelerate's wrapper of it.
        """
        self._detach()
        if self._needs_optimizer:
            rewritten = self.modules if self.config.variant in AFTER_OPTIMIZER else []
            weights = [module.weight(left=left) for module in rewritten for left in (True, False)]
            self._attached = AttachedOptimizer(optimizer, weights, self._after_optimizer_step)

    def step(self) -> None:
        """Do all that belongs to one optimizer step: update, factorise when due, precondition the gradients.

        Raises:
            GritInactiveError: GRIT would do nothing.
        """
        self.update_and_invert_factors()
        self.precondition_gradients()

    def take_loss_denominator(self) -> None:
        """Set `loss_denominator` to what the model's own calls since the last time say.

        That is `num_items_in_batch`, as Transformers' trainer passes it, or else the number of labels that are
        predicted, which TRL's trainer divides by.

        Raises:
            ValueError: a call had neither.
        """
        found = self._of_calls.take()
        if found is None:
            raise ValueError(
                "GRIT cannot tell what the loss is divided by: the model was called with neither num_items_in_batch "
                "nor labels. Use GritTrainer, or set GRITManager.loss_denominator in each step of a loop of your own"
            )
        self.loss_denominator = found

    def update_and_invert_factors(self) -> None:
        """Take over what was captured and, when due, compute what gradients are multiplied by: a step's first half.

        Raises:
            GritInactiveError: the hooks saw no token, or after two update periods nothing would be preconditioned; or
                the variant needs the optimizer and is not attached to it.
        """
        if self._needs_optimizer and self._attached is None:
            raise GritInactiveError(
                f"variant {self.config.variant!r} and reprojection act on the optimizer: call "
                "GRITManager.attach(optimizer) before the first step"
            )
        self._last_update = self.steps
        self._unchecked |= self._capturing
        if self._capturing:
            for group in self._groups:
                group.update(self.loss_scale / self.loss_denominator)
        renewed = self.steps % at(self.config.kfac_update_freq, self.steps) == 0
        if renewed:
            for preconditioner in self.preconditioners:
                preconditioner.renew()
            self._check_active()
        on = self.config.variant != "adamw" and self.steps >= at(self.config.ng_warmup_steps, self.steps)
        if renewed or on != self._on:
            self._on = on
            for preconditioner in self.preconditioners:
                preconditioner.use(on, self._attached)

    def precondition_gradients(self) -> None:
        """Precondition the gradients of all modules in place, set `last_diagnostics`, and count the step as done.

        The diagnostics: `grad_norm` and `grad_norm_preconditioned` of all LoRA gradients (of the unscaled loss), their
        `norm_ratio` and the `cosine` between the two, `ready` (share of modules with factors in use), `condition_h` and
        `condition_u` (largest condition number of the damped factors applied to B and to A), `tokens` (real tokens seen
        by the first module), `rank` (mean over the modules). With `graft` they compare what it would be before Adam.
        With `eigen_adam` there is no `cosine`: the second gradient is the first in another basis.

        Raises:
            GritInactiveError: for two update periods `update_and_invert_factors` was not called.
        """
        check_updates(self.steps - self._last_update, 2 * at(self.config.kfac_update_freq, self.steps))
        write = self._on and self.config.variant in BEFORE_OPTIMIZER
        self._diagnose([result for one in self.preconditioners for result in one.precondition(write)])
        self._of_calls.clear()
        self.steps += 1
        self._capturing = self.steps % at(self.config.cov_update_freq, self.steps) == 0
        self._missed_steps, self._witness_version = -1, self._witness._version

    def state_dict(self) -> dict[str, Tensor]:
        """Factors, what is computed from them, counters and the step: tensors by name, as safetensors wants them."""
        state = {"steps": torch.tensor(self.steps), "on": torch.tensor(self._on)}
        for index, preconditioner in enumerate(self.preconditioners):
            state |= {f"{index}.{name}": tensor for name, tensor in preconditioner.state_dict().items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over the state of a manager of the same model.

        Args:
            state: what `state_dict` gave.
        """
        self.steps, self._on = int(state["steps"]), bool(state["on"])
        self._last_update = self.steps
        self._capturing = self.steps % at(self.config.cov_update_freq, self.steps) == 0
        for index, preconditioner in enumerate(self.preconditioners):
            prefix = f"{index}."
            own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            preconditioner.load_state_dict(own)

    def memory_bytes(self) -> int:
        """Bytes of factors and of what is computed from them."""
        return sum(preconditioner.memory_bytes() for preconditioner in self.preconditioners)

    def close(self) -> None:
        """Remove all hooks, from the model and from the optimizer."""
        self._handle.remove()
        self._detach()
        for group in self._groups:
            group.close()

    @property
    def _needs_optimizer(self) -> bool:
        return self.config.variant in AFTER_OPTIMIZER or self.config.reprojection_freq > 0

    def _detach(self) -> None:
        if self._attached:
            self._attached.close()
            self._attached = None

    def _after_optimizer_step(self, attached: AttachedOptimizer) -> None:
        if self._on and self.config.variant in AFTER_OPTIMIZER:
            for preconditioner in self.preconditioners:
                preconditioner.rewrite_updates(attached)
        if self.config.reprojection_freq and self.steps % self.config.reprojection_freq == 0:
            for preconditioner in self.preconditioners:
                reproject(preconditioner.factors, attached, self.config)
                preconditioner.renew()
                preconditioner.use(self._on, None)

    def _diagnose(self, results: list[Comparison]) -> None:
        """Reduce the figures of a step with a single transfer from the device."""
        if not results:
            self.last_diagnostics = {}
            return
        device = results[0].inner.device
        ones = self.preconditioners
        raw, new, inner = (
            torch.stack([getattr(result, name).to(device) for result in results]).sum()
            for name in ("raw_squared", "squared", "inner")
        )
        if self.config.variant == "adamw":
            new = inner = raw
        figures = {
            "grad_norm": raw.sqrt() / self.loss_scale,
            "grad_norm_preconditioned": new.sqrt() / self.loss_scale,
            "norm_ratio": (new / raw.clamp_min(torch.finfo(raw.dtype).tiny)).sqrt(),
            "cosine": inner / (raw.sqrt() * new.sqrt()).clamp_min(torch.finfo(raw.dtype).tiny),
            "ready": torch.cat([one.ready.to(device) for one in ones]).float().mean(),
            "condition_h": torch.stack([one.condition_b.max().to(device) for one in ones]).max(),
            "condition_u": torch.stack([one.condition_a.max().to(device) for one in ones]).max(),
            "tokens": self._groups[0].samples[0].to(device),
            "rank": torch.cat([group.ranks.to(device) for group in self._groups]).float().mean(),
        }
        if self.config.variant == "eigen_adam":
            del figures["cosine"]
        self.last_diagnostics = dict(zip(figures, torch.stack(list(figures.values())).tolist(), strict=True))

    def _check_active(self) -> None:
        seen, captured = (
            max(float(getattr(group, name).max()) for group in self._groups) for name in ("samples", "captured")
        )
        if self._unchecked:
            check_hooks(captured - self._captured_before)
        self._captured_before, self._unchecked = captured, False
        late = max(2 * at(self.config.kfac_update_freq, self.steps), at(self.config.ng_warmup_steps, self.steps))
        if self.config.variant != "adamw" and self.steps >= late:
            roots = [root for one in self.preconditioners for root in one.roots]
            check_effect(self.steps, seen, self.config.kfac_min_samples, roots)

    def _before_forward(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read mask and loss denominator from the model's own call; notice optimizer steps that passed the manager."""
        if self._paused or not torch.is_grad_enabled():
            return
        call = self._read_call(args, kwargs)
        self._mask = token_mask(call)
        for preconditioner in self.preconditioners:
            preconditioner.follow_modules()
        self._of_calls.add(call)
        if call.get("num_items_in_batch") is not None:
            self.loss_denominator = call["num_items_in_batch"]
        if self._witness._version != self._witness_version:
            self._witness_version = self._witness._version
            self._missed_steps += 1
            check_steps(self._missed_steps, 2 * at(self.config.kfac_update_freq, self.steps))
