"""GRIT: a K-FAC natural gradient in LoRA's rank space. Needs torch and peft; transformers and TRL for the trainers.

`variants` is the table of what GRIT can do. `modules` finds the adapters, `factors` captures, `preconditioning` and
`reprojection` hold the mathematics, `preconditioner` applies it, `manager` says when, `witness` and `proof` whether it
happens; `basis` finds the first A; `export` saves adapters of smaller rank.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "GRITConfig": "grit.config",
    "GRITManager": "grit.manager",
    "GritCallback": "grit.callback",
    "GritInactiveError": "grit.proof",
    "GritTrainer": "grit.trainer",
    "save_adapter": "grit.export",
    "set_gradient_basis": "grit.basis",
}
__all__ = [
    "GRITConfig",
    "GRITManager",
    "GritCallback",
    "GritInactiveError",
    "GritTrainer",
    "save_adapter",
    "set_gradient_basis",
]


def __getattr__(name: str) -> Any:
    """Import on first use, so that reading the configuration loads neither torch nor TRL (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'grit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
