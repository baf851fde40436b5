"""What says to which modules a manager's state belongs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from grit.factors import FactorGroup

OWNERS = "owners"
"""Name of the tensor in the state."""


def owners(groups: Sequence[FactorGroup], variant: str) -> Tensor:
    """The variant, and the names and ranks of the modules in the order of the state, as JSON in bytes (uint8)."""
    named = [{module.name: module.lora_a.out_features for module in group.modules} for group in groups]
    text = json.dumps({"variant": variant, "modules": named})
    return torch.frombuffer(bytearray(text, "utf-8"), dtype=torch.uint8)


def check_owners(state: Mapping[str, Tensor], own: Tensor) -> None:
    """Check that a state is of the same variant and of the same modules.

    Args:
        state: what `GRITManager.state_dict` gave.
        own: what `owners` gives here.

    Raises:
        ValueError: it is not; naming what differs first.
    """
    if OWNERS not in state:
        raise ValueError("this is no state of a GRITManager, or one of an older version: it names no modules")
    theirs, ours = (json.loads(bytes(tensor.tolist())) for tensor in (state[OWNERS], own))
    if theirs["variant"] != ours["variant"]:
        raise ValueError(f"the state is of the variant {theirs['variant']!r}, the manager's is {ours['variant']!r}")
    of_file, of_own = (
        [f"{name} of rank {rank}" for group in owner["modules"] for name, rank in group.items()]
        for owner in (theirs, ours)
    )
    for position in range(max(len(of_file), len(of_own))):
        of_state, of_manager = (names[position] if position < len(names) else "none" for names in (of_file, of_own))
        if of_state != of_manager:
            raise ValueError(
                f"the state is of other LoRA modules than the manager's: module {position + 1} is {of_state} there, "
                f"{of_manager} here"
            )
    if theirs != ours:
        raise ValueError("the state is of the same LoRA modules, spread over other devices")
