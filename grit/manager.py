"""When things happen: capture, update, factorise, precondition, once per optimizer step; and proof that they did."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from grit.calls import LossDenominator, base_of, check_one_length, reader, token_mask
from grit.config import GRITConfig
from grit.diagnostics import step_figures
from grit.factors import FactorGroup
from grit.modules import LoraModule, lora_modules
from grit.optimizer import AttachedOptimizer
from grit.preconditioner import Preconditioner
from grit.proof import GritInactiveError, check_attached, check_effect, check_gradients, check_updates
from grit.reprojection import reproject
from grit.state import OWNERS, check_owners, owners
from grit.witness import PERIODS, StepWitness, TokenWitness


class GRITManager:
    """GRIT for the LoRA modules of a PEFT model.

    Call `step()`, or the two calls that it consists of, once per optimizer step, on the full accumulated gradient,
    before clipping. `GritTrainer` does so, and `GritCallback` in any other trainer; in a bare loop
    `optimizer.register_step_pre_hook(lambda *_: manager.step())` is a clean place. Variants that act on the optimizer,
    and reprojection, also need `attach(optimizer)`.

    The factors are per real token: padding is read from the `attention_mask` [batch, length] of the model's own call.
    Gradients of anything but LoRA's A and B (such as `modules_to_save`) are left alone, as are modules without a
    gradient. With several processes the factors are those of all of them.

    Args:
        model: a PEFT model with LoRA adapters on linear layers; the active adapters are handled.

    Raises:
        ValueError: no LoRA module; DoRA and other variants of the layer, LoRA on embeddings or convolutions, sharded
            weights; an encoder-decoder.
    """

    def __init__(self, model: nn.Module, config: GRITConfig | None = None) -> None:
        check_one_length(model)
        self.config = config or GRITConfig()
        self.loss_denominator: float | Tensor = 1.0
        """What the summed loss was divided by, e.g. the supervised tokens of the accumulated batch; with DDP, which
        averages the gradients, that over the number of processes. It is read from `num_items_in_batch` in the model's
        own call, as Transformers' trainer passes it; elsewhere set it per step."""
        self.loss_scale: float = 1.0
        """What the loss was multiplied by before the backward pass, a gradient scaler's factor; set per step under
        float16."""
        self.gradient_scale: float = 1.0
        """What the gradients are still multiplied by when they are preconditioned, for the reported norms:
        `loss_scale`, or 1 where the scaler has unscaled them, as it has within `optimizer.step()`."""
        self.last_diagnostics: dict[str, float] = {}
        """Figures of the last step, see `grit.diagnostics.step_figures`."""
        self.basis_seconds = 0.0
        """Seconds that finding the first basis took, see `grit.basis`."""
        self.steps = 0
        """Optimizer steps so far."""
        self.modules: list[LoraModule] = lora_modules(model)
        """What is handled."""
        by_rank = defaultdict(list)
        for module in self.modules:
            by_rank[module.lora_a.out_features, module.lora_a.weight.device].append(module)
        self.factor_groups = [
            FactorGroup(modules, self.config.kfac_ema, lambda: self._mask, lambda: self._capturing)
            for modules in by_rank.values()
        ]
        """The factors of the modules, those of one rank (and device) together."""
        self.preconditioners = [Preconditioner(group, self.config) for group in self.factor_groups]
        """One for each of `factor_groups`."""
        self._mask: Tensor | None = None
        self._capturing, self._on, self._paused = True, False, False
        self._unchecked, self._last_update = False, 0
        self.attached: AttachedOptimizer | None = None
        """The optimizer that variant or reprojection act on; none where they need none."""
        self._stepped_before = 0
        """Steps of optimizers before one was attached."""
        self._step_witness = StepWitness(self.modules)
        self._token_witness = TokenWitness(self.factor_groups, self.config)
        self._read_call, self._of_calls = reader(model), LossDenominator(model)
        # PEFT's wrappers call the base model, and so may whoever has a handle on it.
        self._handle = base_of(model).register_forward_pre_hook(self._before_forward, with_kwargs=True)

    @property
    def factors_are_ready(self) -> bool:
        """Whether any module has seen enough tokens for its factors to be used."""
        return any(bool((group.samples >= self.config.kfac_min_samples).any()) for group in self.factor_groups)

    @property
    def ranks(self) -> dict[str, int]:
        """Directions of rank space in use, by module."""
        names = [module.name for group in self.factor_groups for module in group.modules]
        return dict(zip(names, torch.cat([group.ranks.cpu() for group in self.factor_groups]).tolist(), strict=True))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Ignore, within the context, what the model does: for passes that are no training."""
        before = self._capturing, self._paused
        self._capturing, self._paused = False, True
        try:
            yield
        finally:
            self._capturing, self._paused = before
            self._step_witness.forget()

    def attach(self, optimizer: Any) -> None:
        """Watch the steps of an optimizer, if the variant or reprojection acts on it; harmless otherwise.

        Args:
            optimizer: one that keeps `exp_avg` and `exp_avg_sq`, as torch's AdamW does, or Accelerate's wrapper of it.

        Raises:
            ValueError: LoRA's weights are not the optimizer's, or it works in a way that they cannot follow.
        """
        self._detach()
        if self._needs_optimizer:
            weights = [weight for module in self.modules for weight in module.weights]
            rewritten = weights if self.config.variant_row.new_updates else []
            self.attached = AttachedOptimizer(optimizer, weights, rewritten, self._after_optimizer_step)
            self._stepped_before = self._step_witness.steps

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
        denominator = self._of_calls.take()
        if denominator is None:
            raise ValueError(
                "GRIT cannot tell what the loss is divided by: the model was called with neither num_items_in_batch "
                "nor labels. Use GritTrainer, or set GRITManager.loss_denominator in each step of a loop of your own"
            )
        self.loss_denominator = denominator

    def update_and_invert_factors(self) -> None:
        """Take over what was captured and, when due, compute what gradients are multiplied by: a step's first half.

        Raises:
            GritInactiveError: the hooks saw no token, or after two update periods nothing would be preconditioned; or
                the variant needs the optimizer and is not attached to the one that steps.
            ValueError: a throttle's function gave a number that is too small.
        """
        if self._needs_optimizer and self.attached is None:
            raise GritInactiveError(
                f"variant {self.config.variant!r} and reprojection act on the optimizer: call "
                "GRITManager.attach(optimizer) before the first step"
            )
        if self.attached:
            check_attached(self._step_witness.steps - self._stepped_before - self.attached.steps)
        self._last_update = self.steps
        self._unchecked |= self._capturing
        if self._capturing:
            for group in self.factor_groups:
                group.update(self.loss_scale / self.loss_denominator)
        renewed = self.steps % self.config.at("kfac_update_freq", self.steps) == 0
        if renewed:
            for preconditioner in self.preconditioners:
                preconditioner.renew()
            if self._unchecked:
                self._token_witness.look(self.steps)
                self._unchecked = False
        on = not self.config.variant_row.only_measures and self.steps >= self.config.at("ng_warmup_steps", self.steps)
        if renewed or on != self._on:
            self._on = on
            for preconditioner in self.preconditioners:
                preconditioner.use(on, self.attached)
        if renewed:
            self._check_effect()

    def precondition_gradients(self) -> None:
        """Precondition the gradients of all modules in place, set `last_diagnostics`, and count the step as done.

        Raises:
            GritInactiveError: for two update periods `update_and_invert_factors` was not called; there is no gradient;
                or the optimizer has stepped already.
        """
        check_updates(self.steps - self._last_update, self._tolerated)
        self._step_witness.see_step()
        write = self._on and self.config.variant_row.changes_gradient
        results = [result for preconditioner in self.preconditioners for result in preconditioner.precondition(write)]
        check_gradients(len(results))
        self.last_diagnostics = step_figures(
            results, self.preconditioners, self.config.variant_row, self.gradient_scale
        )
        self._of_calls.clear()
        self.steps += 1
        self._capturing = self.steps % self.config.at("cov_update_freq", self.steps) == 0

    def state_dict(self) -> dict[str, Tensor]:
        """Factors, what is computed from them, counters and the step: tensors by name, as safetensors wants them."""
        state = {"steps": torch.tensor(self.steps), "on": torch.tensor(self._on)}
        state[OWNERS] = owners(self.factor_groups, self.config.variant)
        for index, preconditioner in enumerate(self.preconditioners):
            state |= {f"{index}.{name}": tensor for name, tensor in preconditioner.state_dict().items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over the state of a manager of the same model. What was captured for an unfinished step is forgotten.

        Args:
            state: what `state_dict` gave.

        Raises:
            ValueError: it is the state of another variant, or of other modules.
        """
        check_owners(state, owners(self.factor_groups, self.config.variant))
        self.steps, self._on = int(state["steps"]), bool(state["on"])
        self._last_update = self.steps
        self._capturing = self.steps % self.config.at("cov_update_freq", self.steps) == 0
        self._of_calls.clear()
        for index, preconditioner in enumerate(self.preconditioners):
            prefix = f"{index}."
            own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            preconditioner.load_state_dict(own)

    def memory_bytes(self) -> int:
        """Bytes of factors and of what is computed from them."""
        return sum(preconditioner.memory_bytes() for preconditioner in self.preconditioners)

    def close(self) -> None:
        """Remove all hooks, from the model and from optimizers."""
        self._handle.remove()
        self._step_witness.close()
        self._detach()
        for group in self.factor_groups:
            group.close()

    @property
    def _needs_optimizer(self) -> bool:
        return self.config.variant_row.acts_on_optimizer or self.config.reprojection_freq > 0

    @property
    def _tolerated(self) -> int:
        """Steps that may pass without a call that belongs to each."""
        return PERIODS * self.config.at("kfac_update_freq", self.steps)

    def _detach(self) -> None:
        if self.attached:
            self.attached.close()
            self.attached = None

    def _after_optimizer_step(self, attached: AttachedOptimizer) -> None:
        new_updates = self.config.variant_row.new_updates
        if self._on and new_updates:
            for preconditioner in self.preconditioners:
                preconditioner.rewrite_updates(new_updates, attached)
        if self.config.reprojection_freq and self.steps % self.config.reprojection_freq == 0:
            for preconditioner in self.preconditioners:
                reproject(preconditioner.factors, attached, self.config)
                preconditioner.renew()
                preconditioner.use(self._on, None)

    def _check_effect(self) -> None:
        """Once some module's factors have been in use for long enough."""
        ready = any(bool(preconditioner.ready.any()) for preconditioner in self.preconditioners)
        if self._on and self.steps >= self._tolerated and ready:
            check_effect(
                self.steps,
                [effect for preconditioner in self.preconditioners for effect in preconditioner.effects()],
            )

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
        self._step_witness.see_forward(self._tolerated)
