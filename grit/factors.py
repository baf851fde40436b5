"""The factors of all LoRA modules of one rank: captured in forward and backward, averaged over steps.

A forward hook on `lora_A` sees h = A x, a tensor hook on that output sees u = dL/dh. Both sums are formed in the tensor
hook: it fires once per backward, also under gradient checkpointing, where the forward hook fires twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn

from grit.calls import without_padding
from grit.modules import LoraModule

STATE = ("mean_h", "mean_u", "weight", "samples", "ranks")


class FactorGroup:
    """Factors of M modules of rank r.

    Args:
        modules: the LoRA modules, all of one rank and on one device.
        ema: decay of the moving average.
        token_mask: returns the mask of real tokens of the running forward pass, [batch, length] of bool, or None where
            every token is real.
        capturing: says whether the running step is captured.
    """

    def __init__(
        self,
        modules: list[LoraModule],
        ema: float,
        token_mask: Callable[[], Tensor | None],
        capturing: Callable[[], bool],
    ) -> None:
        self.modules, self.ema = modules, ema
        self._token_mask, self._capturing = token_mask, capturing
        count, rank = len(modules), modules[0].lora_a.out_features
        device = modules[0].lora_a.weight.device
        shape = (count, rank, rank)
        self.mean_h, self.mean_u = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
        """Moving averages before bias correction, [M, r, r]."""
        self._sum_h, self._sum_u = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
        self.weight = torch.zeros(count, device=device)
        """Weight of the moving averages, 1 - ema^n after n updates, [M]."""
        self.samples = torch.zeros(count, device=device)
        """Real tokens seen by each module, [M]."""
        self.ranks = torch.full((count,), rank, device=device)
        """Directions of rank space that a reprojection has left, [M], int64."""
        self.captured = torch.zeros(count, device=device)
        """Real tokens that the hooks saw, those of steps with an overflow included, [M]."""
        self._tokens = torch.zeros(count, device=device)
        self._handles = [
            module.lora_a.register_forward_hook(self._forward_hook(index)) for index, module in enumerate(modules)
        ]

    @property
    def sigma_h(self) -> Tensor:
        """Bias-corrected E[h h^T], [M, r, r], float32; zero where nothing was seen."""
        return self.mean_h / self._correction()

    @property
    def sigma_u(self) -> Tensor:
        """Bias-corrected E[u u^T] per token of the summed loss, [M, r, r], float32; zero where nothing was seen."""
        return self.mean_u / self._correction()

    def accumulate(self, index: int, h: Tensor, u: Tensor, mask: Tensor | None) -> None:
        """Add one backward pass of a module; the hooks call it.

        Args:
            index: of the module.
            h: what A gave, [..., r].
            u: the loss's gradient by it, [..., r].
            mask: of real tokens, [batch, length] of bool, on any device; None where every token is real.
        """
        rank = h.shape[-1]
        mask = None if mask is None else mask.to(u.device)  # a model spread over devices has it on the first
        h, u = h.reshape(-1, rank).float(), u.detach().reshape(-1, rank).float()
        h = without_padding(h, mask, self.modules[index].name)  # u is zero at padding: no loss depends on it
        self._tokens[index] += len(h) if mask is None else mask.sum()
        self._sum_h[index].addmm_(h.T, h)
        self._sum_u[index].addmm_(u.T, u)

    def update(self, gradient_scale: float | Tensor) -> None:
        """Move the sums of the finished step into the averages. A step with an overflow, or without tokens, is skipped.

        With several processes the sums and counts of all of them are added first.

        Args:
            gradient_scale: factor by which the gradient of the summed loss was multiplied (loss scale over the loss's
                denominator), in this process; the factors do not depend on it.
        """
        if isinstance(gradient_scale, Tensor):
            gradient_scale = gradient_scale.to(self._sum_u.device)
        self._sum_u /= gradient_scale**2  # before processes are added up, each of which may have a scale of its own
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            self._add_up_over_processes()
        seen = self._tokens > 0
        tokens = self._tokens.clamp_min(1)[:, None, None]
        step_h, step_u = self._sum_h / tokens, self._sum_u / tokens
        finite = torch.isfinite(step_h).all(-1).all(-1) & torch.isfinite(step_u).all(-1).all(-1)
        used = seen & finite
        rate = torch.where(used, 1 - self.ema, 0.0)
        for mean, step in ((self.mean_h, step_h), (self.mean_u, step_u)):
            # torch.where keeps the infinities of a skipped step out of the product.
            mean.lerp_(torch.where(used[:, None, None], step, mean), rate[:, None, None])
        self.weight.lerp_(torch.ones_like(self.weight), rate)
        self.samples += torch.where(used, self._tokens, 0)
        self.captured += self._tokens
        self.clear()

    def change_basis(self, q: Tensor, inverse: Tensor) -> None:
        """Follow the change (B, A) -> (B Q^-1, Q A), under which h -> Q h and u -> Q^-T u.

        Args:
            q: [M, r, r]; rows of zeros for directions that were dropped.
            inverse: [M, r, r]; columns of zeros for those.
        """
        self.mean_h.copy_(q @ self.mean_h @ q.mT)
        self.mean_u.copy_(inverse.mT @ self.mean_u @ inverse)

    def clear(self) -> None:
        """Forget what was captured since the last update."""
        for sums in (self._sum_h, self._sum_u, self._tokens):
            sums.zero_()

    def follow(self, device: torch.device) -> None:
        """Move all tensors to where the modules have been moved."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def state_dict(self) -> dict[str, Tensor]:
        """The averages and counters."""
        return {name: getattr(self, name).clone() for name in STATE}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over averages and counters of the same modules, and forget what was captured since."""
        self.clear()
        for name in STATE:
            getattr(self, name).copy_(state[name])

    def memory_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, Tensor))

    def _add_up_over_processes(self) -> None:
        sums = (self._sum_h, self._sum_u, self._tokens)
        flat = torch.cat([local.flatten() for local in sums])
        distributed.all_reduce(flat)
        for local, total in zip(sums, flat.split([local.numel() for local in sums]), strict=True):
            local.copy_(total.view_as(local))

    def _correction(self) -> Tensor:
        return self.weight.clamp_min(torch.finfo(torch.float32).tiny)[:, None, None]

    def _forward_hook(self, index: int) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            if not (self._capturing() and torch.is_grad_enabled() and output.requires_grad):
                return
            mask, h = self._token_mask(), output.detach()
            output.register_hook(lambda u: self.accumulate(index, h, u, mask))

        return hook
