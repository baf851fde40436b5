"""A LoRA adapter as files: which weights of the base it changes, and what each of them becomes."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from tasks.engine.errors import UserError
from tasks.export.rounding import rounded
from tasks.model.files import opened

FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
A, B, MAGNITUDE, COPY = "A.weight", "B.weight", "magnitude_vector", ".base_layer.weight"
"""Ends of the keys; PEFT adds a copy of the base's own weight where an adapter is on embedding or output layer."""
NOT_IN_THE_MERGE = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("megatron_core", "modules_to_save", "bias", "eva_config", "qalora_group_size"),
}
"""Settings that choose or train what the tensors in the file already tell."""
IN_THE_MERGE = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out"}
STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Starts of A and B that leave the base as it is; after others, such as PiSSA, the adapter belongs to another base."""


class Adapter:
    """A LoRA, rsLoRA or DoRA adapter; its tensors are read when they are needed.

    Args:
        directory: of PEFT's `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        RuntimeError: an A without B or the reverse, a tensor that would be lost, or a B that was never trained.
        UserError: a kind of adapter that cannot be merged here.
    """

    def __init__(self, directory: Path) -> None:
        self.file = directory / FILE
        self.config: Any = LoraConfig.from_pretrained(str(directory))
        _check_kind(self.config)
        self.low_rank: dict[str, dict[str, str]] = {}
        """Keys of A, B and DoRA's magnitude, by the name of the weight that they change."""
        self.replaced: dict[str, str] = {}
        """Keys of biases, and of modules that were trained as a whole, by the tensor that they take the place of."""
        for key in self._keys():
            module, lora, part = key.removeprefix(PREFIX).rpartition(".lora_")
            if lora and part in (A, B, MAGNITUDE):
                self.low_rank.setdefault(f"{module}.weight", {})[part] = key
            elif key.endswith(COPY):
                self.low_rank.setdefault(key.removeprefix(PREFIX).replace(COPY, ".weight"), {})[COPY] = key
            elif lora or not (self.config.modules_to_save or self.config.bias != "none"):
                raise RuntimeError(f"the adapter's tensor {key} is no LoRA weight and would be lost in the merge")
            else:
                self.replaced[key.removeprefix(PREFIX).replace(".base_layer.", ".")] = key
        self._check_complete()

    @property
    def targets(self) -> set[str]:
        """Names of the base's tensors that the adapter changes."""
        return self.low_rank.keys() | self.replaced.keys()

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """What becomes of a tensor of the base: W + s B A, with s = alpha / r, or alpha / sqrt(r) for rsLoRA.

        LoRA is arXiv 2106.09685, rsLoRA 2312.03732. DoRA (arXiv 2402.09353, equation 5) gives each row of the sum
        the norm that it has learned. All is computed in float32, in PEFT's order, and `rounded` once.

        Args:
            name: of the tensor, one of `targets`.
            weight: its values, in any floating dtype; out x in, or in x out where the adapter says `fan_in_fan_out`.

        Returns:
            The new values, in the same shape and dtype.

        Raises:
            RuntimeError: shape or rank do not fit, the adapter brings a copy of another base's weight, or nothing
                would change.
        """
        new = self._tensor(self.replaced[name]) if name in self.replaced else self._sum(name, weight.float())
        if new.shape != weight.shape:
            raise RuntimeError(f"{name} is {tuple(weight.shape)} in the base and {tuple(new.shape)} in the adapter")
        merged = rounded(new, weight.dtype, seed=zlib.crc32(name.encode()))
        if torch.equal(merged, weight):
            raise RuntimeError(f"{name} was not changed by the merge")
        return merged

    def _sum(self, name: str, weight: Tensor) -> Tensor:
        keys = self.low_rank[name]
        if COPY in keys and not torch.equal(self._tensor(keys[COPY]).float(), weight):
            raise RuntimeError(f"the adapter was trained with another {name} than this base has")
        a, b = self._tensor(keys[A]).float(), self._tensor(keys[B]).float()
        flipped = self.config.fan_in_fan_out
        delta = (b @ a).T if flipped else b @ a
        new = weight + delta.mul_(self._scale(name.removesuffix(".weight"), len(a)))
        if MAGNITUDE in keys:
            norm = torch.linalg.norm(new.T if flipped else new, dim=1)
            factor = (self._tensor(keys[MAGNITUDE]).float() / norm).view(-1, 1)
            new = (factor.T if flipped else factor) * new
        return new

    def _scale(self, module: str, rank: int) -> float:
        def of(pattern: dict[str, int], default: int) -> int:
            return pattern.get(get_pattern_key(list(pattern), module), default)

        if rank != of(self.config.rank_pattern, self.config.r):
            raise RuntimeError(f"{module} has the rank {rank}, and the adapter's configuration says another")
        alpha = of(self.config.alpha_pattern, self.config.lora_alpha)
        return alpha / (math.sqrt(rank) if self.config.use_rslora else rank)

    def _check_complete(self) -> None:
        wanted = {A, B, MAGNITUDE} if self.config.use_dora else {A, B}
        if incomplete := sorted(name for name, keys in self.low_rank.items() if keys.keys() - {COPY} != wanted):
            raise RuntimeError(f"the adapter has only A or only B, or no magnitude, for {', '.join(incomplete)}")
        if untrained := sorted(name for name, keys in self.low_rank.items() if not bool(self._tensor(keys[B]).any())):
            raise RuntimeError(f"B is zero, so nothing was learned, in {', '.join(untrained)}")

    def _keys(self) -> Iterator[str]:
        with opened(self.file, "pt") as tensors:
            yield from tensors.keys()

    def _tensor(self, key: str) -> Tensor:
        with opened(self.file, "pt") as tensors:
            return tensors.get_tensor(key)


def _check_kind(config: Any) -> None:
    plain = LoraConfig().to_dict()
    unknown = sorted(
        name
        for name, value in config.to_dict().items()
        if name not in NOT_IN_THE_MERGE | IN_THE_MERGE | {"init_lora_weights"} and value != plain.get(name)
    )
    if config.init_lora_weights not in STARTS:
        unknown.append(f"init_lora_weights={config.init_lora_weights}")
    if unknown:
        raise UserError(
            f"adapters with {', '.join(unknown)} cannot be merged here",
            where="adapter_config.json",
            fix="Use LoRA, rsLoRA or DoRA.",
        )
