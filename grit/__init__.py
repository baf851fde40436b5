"""GRIT: a K-FAC natural gradient in LoRA's rank space. Needs torch and peft, and TRL for the trainer.

The mathematics is in `preconditioning`, the capture in `factors`, the timing in `manager`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "GRITConfig": "grit.config",
    "GRITManager": "grit.manager",
    "GritInactiveError": "grit.manager",
    "GritTrainer": "grit.trainer",
}
__all__ = ["GRITConfig", "GRITManager", "GritInactiveError", "GritTrainer"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that reading the configuration loads neither torch nor TRL (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'grit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
