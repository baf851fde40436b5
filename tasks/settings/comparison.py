"""What is compared: the methods, how often each is trained, and what is measured beside the stages' own figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from tasks.export_settings import without_secret
from tasks.section import NO_MATTER, Count, PositiveInt, Section
from tasks.settings import PEFT_OPTIMIZERS, FinetuneSettings

ComparedMethod = Literal[
    "baseline",
    "baseline-unsloth",
    "grit",
    "grit:adamw",
    "grit:kfac",
    "grit:eigen_adam",
    "grit:graft",
    "grit:riemannian",
    "grit:published",
    "lora_plus",
    "lora_fa",
    "riemannian",
    "study-fault",
]
FAULT = "study-fault"
"""A reproduction of a fault, see `tasks.training_fault`: no method, and nothing is made of it."""
EVALUATIONS = 10
"""Validations during a training whose settings ask for none: the curves and the time to a loss need some."""


class CompareSettings(Section):
    """What a comparison does."""

    methods: tuple[ComparedMethod, ...] = Field(("baseline", "grit"), min_length=1)
    """What is compared; the first is what the others are measured against. `grit:VARIANT` is GRIT with another variant,
    `study-fault` a reproduction of the study's faults."""
    seeds: PositiveInt = 3
    """Trainings of each method. Their seeds count up from the setting `seed`, which alone rules the data."""
    learning_rates: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Rates that every method is first trained with, by the first seed; the one of the lowest final validation loss is
    then its own. None: all methods train with the setting `training.learning_rate`."""
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.95
    """Confidence of the intervals; divided among the other methods where the best of several is marked."""
    answers: Count = 32
    """Held-out prompts that every model answers, for what the loss does not show."""
    judge_model: str | None = None
    """A model that judges the answers of each method against the first one's, in both orders; none: no judge."""
    judge_url: str = "http://127.0.0.1:11434/v1"
    """Its server, which speaks OpenAI's protocol; a key goes into the environment as OPENAI_API_KEY."""
    second_data: str | None = None
    """A second data set, on which nothing is trained, named like `data.source`: whether the gain holds elsewhere."""
    second_rows: PositiveInt = 64
    """Rows of it that are measured, at most."""
    forgetting_text: Path | None = None
    """A text that no method was trained on, paragraphs apart by empty lines; none: the one that comes with this."""

    cluster: Annotated[str, Field(pattern=r"^(tcp|tls|ray)://[^\s/@]+:\d+$")] | None = Field(
        None, json_schema_extra=NO_MATTER
    )
    """Scheduler of a Dask (`tcp://HOST:8786`) or Ray (`ray://HOST:10001`) cluster whose workers train; none: all
    trainings run here, one after the other."""

    _no_secret = field_validator("judge_url")(without_secret)

    @field_validator("methods", mode="after")
    @classmethod
    def _once_each_and_a_real_one_first(cls, methods: tuple[ComparedMethod, ...]) -> tuple[ComparedMethod, ...]:
        if len(set(methods)) < len(methods):
            raise ValueError("a method is named twice")
        if methods and methods[0] == FAULT:
            raise ValueError(f"{FAULT} is no method to measure others against: name another first")
        return methods

    @field_validator("learning_rates", mode="after")
    @classmethod
    def _once_each(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(rates)) < len(rates):
            raise ValueError("a rate is named twice")
        return rates

    def training_seeds(self, seed: int) -> tuple[int, ...]:
        """The seeds of the trainings of each method.

        Args:
            seed: the setting `seed`, which is the first of them.
        """
        return tuple(range(seed, seed + self.seeds))


def settings_of(method: ComparedMethod, settings: FinetuneSettings) -> FinetuneSettings:
    """The settings with which a method is trained, and nothing is registered.

    A method's name says how it optimises, whatever the shared settings say: `baseline` and `grit` take AdamW, with
    8-bit state where that is set, and all but `baseline-unsloth` train with Transformers.

    Args:
        method: which.
        settings: shared by all methods.

    Raises:
        ValueError: the method is a reproduction of a fault, which has no settings of its own.
    """
    if method == FAULT:
        raise ValueError(f"{FAULT} is no method")
    name, _, variant = method.partition(":")
    values = settings.model_dump()
    if variant:
        values["grit"]["variant"] = variant
    if name in PEFT_OPTIMIZERS:
        values["training"]["optimizer"] = name
    elif settings.training.optimizer in PEFT_OPTIMIZERS:
        values["training"]["optimizer"] = "adamw_torch"
    values["training"]["backend"] = "unsloth" if name == "baseline-unsloth" else "transformers"
    values["method"] = "grit" if name == "grit" else "baseline"
    values["ollama"]["target"] = "none"
    return FinetuneSettings.model_validate(values)


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
    every = {"eval_tokens": max(1, round(training.supervised_tokens(card) / EVALUATIONS))}
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
    found = []
    for section, value in settings.model_dump(mode="json").items():
        if section == "grit" and settings.method != "grit":
            continue
        if isinstance(value, dict):
            found += [(f"{section}.{key}", inner) for key, inner in value.items()]
        else:
            found.append((section, value))
    return found
