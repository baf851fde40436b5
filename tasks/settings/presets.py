"""Presets: complete settings as YAML files, with single values put over them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from pydantic import BaseModel, Field, ValidationError, create_model

from tasks.engine.errors import UserError
from tasks.engine.paths import REPOSITORY, checkout_directory
from tasks.settings.base import Section
from tasks.settings.finetune import FinetuneSettings
from tasks.settings.renamed import renamings

PRESETS = REPOSITORY / "presets"


def optional(section: type[BaseModel], leave_out: frozenset[str] = frozenset()) -> type[Section]:
    """The same settings, each with its type and limits but none with a value: what may be put over a preset.

    Args:
        section: the settings.
        leave_out: names of fields that are given otherwise.
    """
    fields: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        kind: Any = field.annotation
        if inspect.isclass(kind) and issubclass(kind, BaseModel):
            kind = optional(kind)
        elif field.metadata:
            kind = Annotated[(kind, *field.metadata)]
        if name not in leave_out:
            fields[name] = kind | None, Field(None, description=field.description)
    return create_model(f"{section.__name__}Overrides", __base__=Section, __doc__=section.__doc__, **fields)


if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

    Overrides = Section
else:
    Overrides = optional(FinetuneSettings, frozenset({"method"}))
"""What may be put over a preset: a typed form in Prefect's pages, and validated before a run begins."""


def given(overrides: BaseModel | Mapping[str, Any] | None) -> dict[str, Any]:
    """What overrides hold, nested; a dotted key such as `training.max_steps` reaches inside."""
    if isinstance(overrides, BaseModel):
        return overrides.model_dump(mode="json", exclude_unset=True)
    nested: dict[str, Any] = {}
    for key, value in (overrides or {}).items():
        nested = _merged(nested, _nested(key.split("."), value))
    return nested


def preset_path(preset: str) -> Path:
    """Find a preset by its name in `presets/` or by the path of a YAML file.

    Raises:
        UserError: there is no such preset, or no checkout that has some.
    """
    is_file = preset.endswith((".yaml", ".yml"))
    path = Path(preset).expanduser() if is_file else checkout_directory("presets") / f"{preset}.yaml"
    if not path.is_file() or (not is_file and Path(preset).name != preset):
        names = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
        raise UserError(
            "no such preset", where=f"--preset {preset}", fix=f"Use one of {names}, or the path of a YAML file."
        )
    return path


def load_settings(preset: str, overrides: Mapping[str, Any] | None = None) -> FinetuneSettings:
    """Read a preset, put the overrides over it, and validate the whole.

    Args:
        preset: a name in `presets/` or the path of a YAML file.
        overrides: as `given` takes them.

    Raises:
        UserError: unknown preset, unreadable YAML, unknown setting or impossible value.
    """
    path = preset_path(preset)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"not valid YAML: {error}", where=path, fix="Correct the file.") from None
    if not isinstance(values, dict):
        raise UserError("the file holds no settings", where=path, fix="Start from a file in presets/.")
    over = given(overrides)
    try:
        return FinetuneSettings.model_validate(_merged(values, over))
    except ValidationError as error:
        from_preset = not any(_holds(over, fault["loc"]) for fault in error.errors())
        raise settings_error(error, path if from_preset else f"settings given beside {path}") from None


def settings_error(error: ValidationError, where: object) -> UserError:
    """Turn pydantic's report into one line that names each faulty setting."""
    faults = "; ".join(text for fault in error.errors() for text in _in_words(fault))
    return UserError(faults, where=where, fix="`--help` lists every setting.")


def _in_words(fault: ErrorDetails) -> list[str]:
    """A faulty setting; of one that an earlier version had, what it is called now."""
    if renamed := list(renamings(".".join(key for key in fault["loc"] if isinstance(key, str)), fault["input"])):
        return renamed
    name = ".".join(map(str, fault["loc"])) or "settings"
    what = "unknown setting" if fault["type"] == "extra_forbidden" else fault["msg"].removeprefix("Value error, ")
    return [f"{name}: {what}" + (f" (got {fault['input']!r})" if _may_be_shown(fault) else "")]


def _may_be_shown(fault: ErrorDetails) -> bool:
    """Not what is long, nor what a validator of ours refuses, which may hold a secret."""
    return fault["type"] != "value_error" and not isinstance(fault["input"], dict | Section)


def _holds(given: Any, keys: tuple[int | str, ...]) -> bool:
    """Whether something was given at or below the place that an error names."""
    for key in keys:
        if not isinstance(given, Mapping):
            return True
        if key not in given:
            return False
        given = given[key]
    return bool(keys)


def _nested(keys: list[str], value: Any) -> dict[str, Any]:
    return {keys[0]: value if len(keys) == 1 else _nested(keys[1:], value)}


def _merged(under: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(below, dict) and isinstance(value, Mapping)
        merged[key] = _merged(dict(below or {}), value) if both else value
    return merged
