"""Adapters whose modules have different ranks, as plain PEFT adapters of just that size."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from grit.modules import LoraModule, lora_modules


def save_adapter(model: PeftModel, directory: Path, adapter: str | None = None) -> dict[str, int]:
    """Save an adapter as safetensors, without the directions of rank space that a reprojection has cut.

    Each module's rank goes into PEFT's `rank_pattern`, and into `alpha_pattern` what keeps its scale s. Both then name
    each module by its whole path: PEFT takes the first pattern that matches, in the order of the file's sorted keys.

    Args:
        model: the trained model.
        directory: where PEFT writes; it puts adapters of other names than `default` into directories below.
        adapter: which of the active ones; may be left out where there is one.

    Returns:
        The saved rank of each module, by its path.

    Raises:
        ValueError: the adapter is not active, or there are several and none is named.
    """
    active = model.active_adapters
    if adapter is None and len(active) > 1:
        raise ValueError(f"several adapters are active ({', '.join(active)}): name the one to save as `adapter`")
    adapter = active[0] if adapter is None else adapter
    if adapter not in active:
        raise ValueError(f"the adapter {adapter} is not active; active: {', '.join(active)}")
    config: Any = model.peft_config[adapter]
    modules = [module for module in lora_modules(model) if module.adapter == adapter]
    kept = {module.path: _live(module) for module in modules}
    smaller = {module.path: module for module in modules if not bool(kept[module.path].all())}
    if not smaller:
        model.save_pretrained(str(directory), safe_serialization=True, selected_adapters=[adapter])
        return {path: int(live.sum()) for path, live in kept.items()}
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    ranks = {path: layer.r[adapter] for path, layer in layers.items() if adapter in layer.r}
    alphas = {path: layers[path].lora_alpha[adapter] for path in ranks}
    state = dict(model.state_dict())
    for path, module in smaller.items():
        live = kept[path]
        ranks[path] = int(live.sum())
        alpha = module.scaling * (ranks[path] ** 0.5 if config.use_rslora else ranks[path])
        alphas[path] = int(alpha) if alpha == int(alpha) else alpha
        for side, matrix in (("lora_A", module.lora_a.weight[live]), ("lora_B", module.lora_b.weight[:, live])):
            state[f"{path}.{side}.{adapter}.weight"] = matrix.detach().contiguous()
    shrunk = deepcopy(config)
    shrunk.rank_pattern, shrunk.alpha_pattern = _patterns(ranks, config.r), _patterns(alphas, config.lora_alpha)
    model.peft_config[adapter] = shrunk
    try:
        model.save_pretrained(str(directory), safe_serialization=True, state_dict=state, selected_adapters=[adapter])
    finally:
        model.peft_config[adapter] = config
    return {path: int(live.sum()) for path, live in kept.items()}


def _patterns(values: dict[str, float], default: float) -> dict[str, float]:
    """What is not the default, by a pattern that matches one path only."""
    prefix = "base_model.model."
    return {f"^{path.removeprefix(prefix)}": value for path, value in values.items() if value != default}


def _live(module: LoraModule) -> Tensor:
    """Directions that are not zero in both A and B, [r], of bool; at least one, since PEFT knows no rank 0."""
    with torch.no_grad():
        live = module.lora_a.weight.any(1) | module.lora_b.weight.any(0)
    if not bool(live.any()):
        live[0] = True
    return live
