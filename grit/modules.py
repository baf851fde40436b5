"""The LoRA modules of a PEFT model, and what of them GRIT does not handle."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from grit.products import LoraMatrix


@dataclass(frozen=True)
class LoraModule:
    """One LoRA pair (A, B) of one adapter: y = W x + s B A x."""

    name: str
    """Path of the layer in the model, and the adapter's name."""
    path: str
    """Path of the layer in the model."""
    adapter: str
    """The adapter's name."""
    layer: LoraLayer
    """PEFT's layer, which holds W, A and B."""
    lora_a: nn.Linear
    """Weight [r, d_in]."""
    lora_b: nn.Linear
    """Weight [d_out, r]."""

    @property
    def scaling(self) -> float:
        """s: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        return float(self.layer.scaling[self.adapter])

    def weight(self, matrix: LoraMatrix) -> Tensor:
        """The weight of one of the two."""
        return (self.lora_a if matrix == "A" else self.lora_b).weight

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        """Those of A and of B."""
        return self.lora_a.weight, self.lora_b.weight


def lora_modules(model: nn.Module) -> list[LoraModule]:
    """All trainable LoRA pairs of the active adapters.

    Args:
        model: a PEFT model.

    Raises:
        ValueError: none; DoRA and PEFT's other variants of the layer; LoRA on embeddings, convolutions or bare
            parameters; sharded weights; only one of A and B trainable.
    """
    modules = []
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        for adapter in layer.active_adapters:
            lora_a = layer.lora_A[adapter] if adapter in layer.lora_A else None  # noqa: SIM401, ModuleDict has no get
            lora_b = layer.lora_B[adapter] if adapter in layer.lora_B else None  # noqa: SIM401, likewise
            if lora_a is None and lora_b is None and adapter not in layer.lora_embedding_A:
                continue  # another adapter of the model targets this layer
            if isinstance(layer, ParamWrapper) or not (isinstance(lora_a, nn.Linear) and isinstance(lora_b, nn.Linear)):
                raise ValueError(f"{path}: GRIT handles LoRA on linear layers only")
            if layer.use_dora.get(adapter):
                raise ValueError(f"{path}: GRIT does not handle DoRA, whose magnitude also depends on A and B")
            if adapter in layer.lora_variant:  # such as KaSA, with a diagonal between A and B
                variant = getattr(layer.lora_variant[adapter], "__name__", type(layer.lora_variant[adapter]).__name__)
                raise ValueError(f"{path}: GRIT handles B A x only, and PEFT's {variant} computes something else")
            if hasattr(lora_a.weight, "full_tensor"):
                raise ValueError(f"{path}: GRIT does not handle sharded weights (FSDP, tensor parallelism)")
            if lora_a.weight.requires_grad != lora_b.weight.requires_grad:
                raise ValueError(f"{path}: GRIT needs A and B both trainable; one of them is frozen")
            if lora_a.weight.requires_grad:
                modules.append(LoraModule(f"{path}[{adapter}]", path, adapter, layer, lora_a, lora_b))
    if not modules:
        raise ValueError("the model has no trainable LoRA module with an active adapter")
    return modules


def by_shape(modules: Sequence[LoraModule], matrix: LoraMatrix) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Indices and weights of the modules whose A (or B) have one shape and dtype and a gradient."""
    members: dict[tuple[torch.Size, torch.dtype], list[int]] = defaultdict(list)
    for index, module in enumerate(modules):
        weight = module.weight(matrix)
        if weight.grad is not None:
            members[weight.shape, weight.grad.dtype].append(index)
    for indices in members.values():
        yield indices, [modules[index].weight(matrix) for index in indices]
