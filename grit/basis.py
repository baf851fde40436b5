"""A first basis for A from the gradient of W, found through LoRA's own gradients.

With B = 0 the first steps of LoRA can change W only within the row space of A, which PEFT draws at random. The best row
space of rank r for the mean gradient G [d_out, d_in] of W is that of its top r right singular vectors (the idea of
LoRA-GA, Wang et al. 2024, arXiv 2407.05000). LoRA's own gradients multiply by G, whatever the base is stored in and
without ever forming it: where B A = 0 the model is the base model, and

    A = 0:  dA = s B^T G        B = 0:  dB = s G A^T

so that alternating the two is subspace iteration (Halko, Martinsson & Tropp 2011, arXiv 0909.4061, algorithm 4.4).
`whitened` iterates on diag(S_g)^(-1/2) G diag(S_x)^(-1/2) instead, the gradient in coordinates in which inputs x and
output gradients g have unit variance: the diagonal of K-FAC's full-space factors.

W is left as it is and B is zero afterwards, so that merging, and the adapter's file, are those of plain LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils.hooks import RemovableHandle

from grit.calls import base_of, reader, token_mask, without_padding
from grit.modules import LoraModule, lora_modules
from grit.products import LoraMatrix

HALVES = 3
"""Products with G: into the row space, out of it, and into it again."""


def set_gradient_basis(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Callable[[Any], Tensor],
    *,
    whitened: bool = False,
    seed: int = 0,
) -> None:
    """Turn the rows of each A into the top right singular vectors of the mean gradient of its W, in descending order.

    Each row gets the root mean square norm of A's rows before; B stays zero. Modules that no gradient reaches are left
    as they are, and so is everything where it fails.

    Args:
        model: a PEFT model whose adapter has not been trained.
        batches: what the gradient is taken over; each is used three times.
        loss: the loss of a batch, summed over its tokens, as a scalar with a graph.
        whitened: scale inputs and output gradients to unit variance over the real tokens; padding is read from the
            `attention_mask` of the model's own call.
        seed: rules the start of the iteration.

    Raises:
        ValueError: no batches, an adapter whose B is not zero or that EVA initialised, or one that no gradient reaches.
    """
    modules = lora_modules(model)
    if not batches:
        raise ValueError("a basis from the gradient needs at least one batch")
    if any(bool(module.lora_b.weight.any()) for module in modules):
        raise ValueError(
            "the basis can be set only before training, while every B is zero. To train on from an adapter, or from a "
            'start of PEFT\'s own (pissa, lora_ga, corda and others), use GRITConfig(basis="initial")'
        )
    configs: Any = getattr(model, "peft_config", {})
    if any(getattr(configs.get(module.adapter), "init_lora_weights", None) == "eva" for module in modules):
        raise ValueError('the basis would replace what EVA found: use GRITConfig(basis="initial")')
    starts = [module.lora_a.weight.detach().clone() for module in modules]
    new_rows: dict[int, Tensor] = {}
    try:
        new_rows = _iterate(model, modules, starts, batches, loss, whitened, seed)
    finally:
        with torch.no_grad():
            for index, (module, start) in enumerate(zip(modules, starts, strict=True)):
                module.lora_a.weight.copy_(new_rows.get(index, start))
                module.lora_b.weight.zero_()
        model.zero_grad(set_to_none=True)
    if not new_rows:
        raise ValueError("no gradient reached any LoRA module: the loss does not depend on them, or is constant")


def _iterate(
    model: nn.Module,
    modules: list[LoraModule],
    starts: list[Tensor],
    batches: Sequence[Any],
    loss: Callable[[Any], Tensor],
    whitened: bool,
    seed: int,
) -> dict[int, Tensor]:
    """The new A by index of the module, for those that a gradient reaches; leaves anything in A and B."""
    scales = [_Scales(module) for module in modules]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in modules:
            b = module.lora_b.weight
            b.copy_(torch.randn(b.shape, generator=generator).to(b))
            _orthonormalise(b)
            module.lora_a.weight.zero_()
    reached = set(range(len(modules)))
    for half in range(HALVES):
        into_rows = half % 2 == 0
        with _watching(model, scales, whitened and half == 0):
            reached &= _differentiate(model, modules, batches, loss, "A" if into_rows else "B")
        if half < HALVES - 1:
            for index in reached:
                _turn(modules[index], scales[index], into_rows=into_rows)
    return {index: _new_rows(modules[index], scales[index], starts[index].float()) for index in reached}


@torch.no_grad()
def _new_rows(module: LoraModule, scale: _Scales, start: Tensor) -> Tensor:
    """Right singular vectors of dA in the coordinates of x, filled up from `start`, as [r, d_in], float32."""
    gradient = _gradient(module.lora_a.weight)
    vectors = torch.linalg.svd(gradient * scale.x, full_matrices=False).Vh * scale.x  # [k, d_in]
    norm = start.norm() / math.sqrt(len(start))
    return norm * torch.linalg.qr(torch.cat([vectors, start])[: len(start)].mT).Q.mT


class _Scales:
    """diag(S_x)^(-1/2) and diag(S_g)^(-1/2) of one layer, damped; ones until they are watched."""

    def __init__(self, module: LoraModule) -> None:
        self.module = module
        self.x: Tensor = torch.ones((), device=module.lora_a.weight.device)
        """[d_in] or a scalar."""
        self.g: Tensor = torch.ones((), device=module.lora_a.weight.device)
        """[d_out] or a scalar."""
        widths = module.lora_a.in_features, module.lora_b.out_features
        self.sums = [torch.zeros(width, device=module.lora_a.weight.device) for width in widths]
        """Of the squares of x and of g over the real tokens, [d_in] and [d_out]."""

    def watch(self, token_mask: Callable[[], Tensor | None]) -> RemovableHandle:
        """Sum the squares of x and g in every pass from now on."""

        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:
                return
            # Only the sum is kept until the backward pass, not x. It counts there: under gradient checkpointing a layer
            # goes forward twice and backward once.
            x = inputs[0].detach().flatten(0, -2).float()
            x_squares = without_padding(x.square(), token_mask(), self.module.name).sum(0)
            output.register_hook(lambda g: self._add(x_squares, g.flatten(0, -2).float().square().sum(0)))

        layer: Any = self.module.layer
        handle: RemovableHandle = layer.register_forward_hook(hook)
        return handle

    def finish(self, damping: float = 0.01) -> None:
        """Turn the sums into scales."""
        self.x, self.g = ((square / square.mean() + damping).rsqrt() for square in self.sums)

    def _add(self, *squares: Tensor) -> None:
        for total, addend in zip(self.sums, squares, strict=True):
            total += addend


@contextmanager
def _watching(model: nn.Module, scales: list[_Scales], wanted: bool) -> Iterator[None]:
    """Find the scales from what the model does within the context."""
    if not wanted:
        yield
        return
    read, mask = reader(model), None

    def read_mask(_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal mask
        mask = token_mask(read(args, kwargs))

    handles = [base_of(model).register_forward_pre_hook(read_mask, with_kwargs=True)]
    handles += [scale.watch(lambda: mask) for scale in scales]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for scale in scales:
        for total in scale.sums:
            _add_up_over_processes(total)
        scale.finish()


def _differentiate(
    model: nn.Module,
    modules: list[LoraModule],
    batches: Sequence[Any],
    loss: Callable[[Any], Tensor],
    matrix: LoraMatrix,
) -> set[int]:
    """Leave the gradient of the summed loss in each A (or B); returns the modules that one reached, by index."""
    model.zero_grad(set_to_none=True)
    for batch in batches:
        loss(batch).backward()
    weights = [module.weight(matrix) for module in modules]
    reached = torch.tensor([weight.grad is not None and bool(weight.grad.any()) for weight in weights])
    reached = reached.to(weights[0].device, torch.int32)
    _add_up_over_processes(reached)  # a process in which a module got none takes part in the sum all the same
    indices = set(reached.nonzero().flatten().tolist())
    for index in sorted(indices):
        weight = weights[index]
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        _add_up_over_processes(weight.grad)
    return indices


@torch.no_grad()
def _turn(module: LoraModule, scale: _Scales, *, into_rows: bool) -> None:
    """After dA was found: put its row space into A, and zero into B; after dB: the other way round."""
    a, b = module.lora_a.weight, module.lora_b.weight
    if into_rows:
        a.copy_(_gradient(a) * scale.x)
        _orthonormalise(a.T)
        a.mul_(scale.x)
        b.zero_()
    else:
        b.copy_(_gradient(b) * _column(scale.g))
        _orthonormalise(b)
        b.mul_(_column(scale.g))
        a.zero_()


def _column(scale: Tensor) -> Tensor:
    return scale[:, None] if scale.dim() else scale


def _gradient(weight: Tensor) -> Tensor:
    """The gradient, float32, scaled so that products of several do not overflow."""
    gradient = weight.grad.float()  # type: ignore[union-attr]
    return gradient / gradient.abs().max().clamp_min(torch.finfo(gradient.dtype).tiny)


def _orthonormalise(columns: Tensor) -> None:
    """In place; a matrix with more columns than rows gets zeros behind."""
    q = torch.linalg.qr(columns.float()).Q
    columns.zero_()[:, : q.shape[1]] = q.to(columns.dtype)


def _add_up_over_processes(tensor: Tensor) -> None:
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.all_reduce(tensor)
