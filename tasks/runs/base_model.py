"""What is asked of a base model before it is fetched: whether this machine can train it, and this user fetch it."""

from __future__ import annotations

from tasks.engine.errors import UserError
from tasks.engine.planning import Plan
from tasks.model.hub import ask_hub, check_access
from tasks.model.sources import about_parameters, on_hub
from tasks.runs.duration import ESTIMATED
from tasks.runs.waiting import waiting_stages
from tasks.settings.finetune import ModelSettings
from tasks.training.limits import has_cuda

LARGE = 3_000_000_000
"""Weights of which a training or a scoring without a GPU takes days."""


def check_base_model(settings: ModelSettings, plan: Plan, *, computes_here: bool = True) -> None:
    """Refuse a model that is too large for a machine without a GPU, or gated for this user, before it is fetched.

    Where the Hub cannot be asked, the size is taken from the model's name, and access is left to the download.

    Args:
        settings: which model; whether a large one may be trained on a CPU.
        plan: the state of the stages: a model that was fetched is not asked for again.
        computes_here: whether this machine trains, and no cluster.

    Raises:
        UserError: the model is too large or gated, or there is none of that name.
    """
    waiting, fetched = set(waiting_stages(plan)), plan.result_of("fetch_model")
    info = ask_hub(settings) if fetched is None and on_hub(settings) else None
    if computes_here and not settings.large_on_cpu and ESTIMATED & waiting:
        parameters = fetched.facts["parameters"] if fetched else about_parameters(settings, info)
        _check_size(settings.name, parameters)
    if info is not None:
        check_access(settings, info)


def _check_size(name: str, parameters: int | None) -> None:
    if parameters is not None and parameters > LARGE and not has_cuda():
        raise UserError(
            f"{parameters / 1e9:.1f} billion parameters take days without a GPU, and this machine has none",
            where=name,
            fix="Use a machine with an NVIDIA GPU or a smaller model, or set model.large_on_cpu: true.",
        )
