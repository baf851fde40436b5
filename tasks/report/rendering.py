"""What the reports share: templates, numbers as text, and where a report's figures come from."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from pydantic import BaseModel

from tasks.artifacts import Artifact

LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "lm-eval", "llama-cpp-python", "prefect")


def figure(value: float | None) -> str:
    """A figure to four digits after the point; a dash where there is none."""
    return "—" if value is None else f"{value:.4f}"


def signed(value: float | None) -> str:
    """A difference, always with its sign; a dash where there is none."""
    return "—" if value is None else f"{value:+.4f}"


def plusminus(error: float | None) -> str:
    """One standard error, or nothing where none is known."""
    return "" if error is None else f" ± {error:.4f}"


def flat_settings(settings: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting by its dotted name.

    Args:
        settings: a section, or all.
        prefix: put before each name.
    """
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            yield from flat_settings(value, f"{prefix}{name}.")
        else:
            yield prefix + name, ", ".join(map(str, value)) if isinstance(value, tuple) else value


def provenance(device: str, artifacts: Iterable[tuple[str, Artifact]]) -> list[tuple[str, str]]:
    """Machine, versions and digests.

    Args:
        device: what was trained on.
        artifacts: what the report is made of, with the name of each.
    """
    return [
        ("machine", f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {device}"),
        ("Python", platform.python_version()),
        *((name, version(name)) for name in LIBRARIES),
        *((f"{name} SHA-256", artifact.digest) for name, artifact in artifacts),
    ]


def jinja() -> Environment:
    """The templates beside this file; what is not there is an error, and texts stay texts."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
    )
    environment.filters |= {"figure": figure, "signed": signed, "plusminus": plusminus}
    return environment
