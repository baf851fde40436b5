"""What a machine and a method can do: refused before any time is spent."""

from __future__ import annotations

from importlib.util import find_spec

from grit.variants import VARIANTS
from tasks.engine.errors import UserError
from tasks.settings.finetune import GritSettings, ModelSettings, TrainingSettings
from tasks.training.optimizers import OPTIMIZERS


def check_machine(base: ModelSettings, training: TrainingSettings, grit: GritSettings | None) -> None:
    """Refuse what this machine or this method cannot do, before any time is spent.

    Raises:
        UserError: Unsloth with GRIT, without CUDA or not installed; float16 without CUDA; 8-bit Adam with a GRIT that
            acts on Adam's moments; GRIT with an optimizer that it cannot go before.
    """
    optimizer = OPTIMIZERS[training.optimizer]
    if grit and not optimizer.takes_grit:
        raise UserError(
            f"{training.optimizer} is a method of its own, and GRIT goes before AdamW",
            where="training.optimizer",
            fix="Use `--training.optimizer adamw_torch`, or train the baseline.",
        )
    by_variant = grit is not None and VARIANTS[grit.variant].acts_on_optimizer
    if grit and optimizer.moments_obstacle and (by_variant or grit.reprojection_freq):
        raise UserError(
            f"GRIT's {grit.variant if by_variant else 'reprojection'} acts on Adam's moments, "
            f"which {optimizer.moments_obstacle}",
            where="training.optimizer",
            fix="Use `--training.optimizer adamw_torch`.",
        )
    if base.dtype == "float16" and not has_cuda():
        raise UserError("float16 training needs a CUDA GPU", where="model.dtype", fix="Use bfloat16 or float32.")
    if training.backend != "unsloth":
        return
    reason, fix = None, "Use `--training.backend transformers`."
    if grit:
        reason = "Unsloth's fused kernels bypass the hooks that GRIT needs, so GRIT would silently do nothing"
    elif not has_cuda():
        reason = "Unsloth needs a CUDA GPU and this machine has none"
    elif find_spec("unsloth") is None:
        reason, fix = "Unsloth is not installed", "Use the environment that `make setup-unsloth` makes."
    if reason:
        raise UserError(reason, where="training.backend", fix=fix)


def has_cuda() -> bool:
    """Whether torch computes on a GPU here."""
    import torch  # takes seconds, which a run that computes nothing has no need for

    return torch.cuda.is_available()
