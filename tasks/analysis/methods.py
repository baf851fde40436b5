"""The settings with which each compared method is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grit.config import GRITConfig
from tasks.engine.errors import UserError
from tasks.settings.comparison import FAULT, ComparedMethod, CompareSettings
from tasks.settings.finetune import ADAMW, FinetuneSettings, GritSettings, TrainingSettings
from tasks.training.optimizers import OPTIMIZERS
from tasks.training.token_counts import supervised_tokens

EVALUATIONS = 10
"""Validations during a training whose settings ask for none: the curves and the time to a loss need some."""


def training_seeds(comparison: CompareSettings, seed: int) -> tuple[int, ...]:
    """The seeds of the trainings of each method.

    Args:
        comparison: how many.
        seed: the setting `seed`, which is the first of them.
    """
    return tuple(range(seed, seed + comparison.seeds))


def fault_settings(training: TrainingSettings) -> GritSettings:
    """GRIT as the study's code ran it: its factors were computed, and its preconditioner was never switched on.

    Args:
        training: how many steps there are.
    """
    return GritSettings(variant="published", basis="initial", ng_warmup_steps=training.max_steps)


def settings_of(method: ComparedMethod, settings: FinetuneSettings) -> FinetuneSettings:
    """The settings with which a method is trained, and nothing is registered.

    A method's name says how it optimises, whatever the shared settings say: `baseline` and `grit` take AdamW, with
    8-bit state where that is set, and all but `baseline-unsloth` train with Transformers.

    Args:
        settings: shared by all methods.

    Raises:
        ValueError: the method is a reproduction of a fault, which has no settings of its own.
        UserError: GRIT's other settings do not go with the method's variant.
    """
    if method == FAULT:
        raise ValueError(f"{FAULT} is no method")
    name, _, variant = method.partition(":")
    shared = settings.training.optimizer
    backend = "unsloth" if name == "baseline-unsloth" else "transformers"
    optimizer = name if name in OPTIMIZERS else shared if shared in ADAMW else "adamw_torch"
    return settings.model_copy(
        update={
            "method": "grit" if name == "grit" else "baseline",
            "training": settings.training.model_copy(update={"backend": backend, "optimizer": optimizer}),
            "grit": _with_variant(settings.grit, variant) if variant else settings.grit,
            "ollama": settings.ollama.model_copy(update={"target": "none"}),
        }
    )


def _with_variant(grit: GritSettings, variant: str) -> GritSettings:
    own = grit.model_copy(update={"variant": variant})
    try:
        GRITConfig(**own.model_dump())
    except ValueError as error:
        fix = f"Change the section `grit`, or leave grit:{variant} out."
        raise UserError(str(error), where="methods", fix=fix) from None
    return own


def validated_by_tokens(settings: FinetuneSettings, card: Mapping[str, Any]) -> FinetuneSettings:
    """The same settings; those that ask for no validation during training get `EVALUATIONS` of them.

    They come at fixed counts of supervised tokens, to within one step the same for all methods and seeds.

    Args:
        settings: shared by all methods.
        card: the data set's, or its facts.
    """
    training = settings.training
    if training.eval_tokens or training.eval_steps:
        return settings
    every = {"eval_tokens": max(1, round(supervised_tokens(training, card) / EVALUATIONS))}
    return settings.model_copy(update={"training": training.model_copy(update=every)})


def at_rate(settings: FinetuneSettings, learning_rate: float) -> FinetuneSettings:
    """The same settings with another learning rate."""
    training = settings.training.model_copy(update={"learning_rate": learning_rate})
    return settings.model_copy(update={"training": training})


def settings_that_differ(methods: Mapping[Any, FinetuneSettings]) -> list[tuple[str, dict[str, Any]]]:
    """Settings in which methods differ, by dotted name: the value of each method.

    Args:
        methods: settings by method; a baseline's section `grit` counts as off.
    """
    flat = {name: dict(_flat(settings)) for name, settings in methods.items()}
    keys = list(dict.fromkeys(key for values in flat.values() for key in values))
    rows = [(key, {name: values.get(key, "—") for name, values in flat.items()}) for key in keys]
    return [(key, values) for key, values in rows if len({str(value) for value in values.values()}) > 1]


def _flat(settings: FinetuneSettings) -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for section, value in settings.model_dump(mode="json").items():
        if section == "grit" and settings.method != "grit":
            continue
        if isinstance(value, dict):
            flat += [(f"{section}.{key}", inner) for key, inner in value.items()]
        else:
            flat.append((section, value))
    return flat
