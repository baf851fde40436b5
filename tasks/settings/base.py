"""What all sections of the settings have in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue

PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
NO_MATTER: dict[str, JsonValue] = {"decides_the_result": False}
"""Marks a setting that decides nothing about the result, and so is no part of a cache key."""


class Section(BaseModel):
    """Base of all settings: immutable, no unknown keys, no infinite or missing numbers, documented fields."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )
