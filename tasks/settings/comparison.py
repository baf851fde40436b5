"""What is compared: the methods, how often each is trained, and what is measured beside the stages' own figures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from pydantic import Field, field_validator

from grit.config import Variant
from tasks.engine.cache_key import NO_MATTER
from tasks.settings.base import Count, PositiveInt, Section
from tasks.settings.export import without_secret
from tasks.settings.finetune import ADAMW, Optimizer

FAULT = "study-fault"
"""A reproduction of a fault, see `tasks.training.faulty_step`: no method, and nothing is made of it."""


def method_names(variants: Iterable[str], optimizers: Iterable[str]) -> tuple[str, ...]:
    """What can be compared: AdamW, GRIT with each variant, each optimizer that is not AdamW, and the study's fault.

    Args:
        variants: of GRIT.
        optimizers: names of the setting `training.optimizer`.
    """
    with_grit = (f"grit:{variant}" for variant in variants)
    others = (optimizer for optimizer in optimizers if optimizer not in ADAMW)
    return "baseline", "baseline-unsloth", "grit", *with_grit, *others, FAULT


if TYPE_CHECKING:
    ComparedMethod = str
else:
    ComparedMethod = Literal[method_names(get_args(Variant), get_args(Optimizer))]


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
