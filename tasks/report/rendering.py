"""What the reports share: templates, all settings as text, and where a report's figures come from."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from pydantic import BaseModel

from tasks.engine.artifacts import Artifact
from tasks.stats.numbers import figure, plusminus, signed
from tasks.training.machine import LIBRARIES

TEMPLATES = Path(__file__).parent / "templates"


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
    """The templates of the reports; what is not there is an error, and texts stay texts."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
    )
    environment.filters |= {"figure": figure, "signed": signed, "plusminus": plusminus}
    return environment


def template_files(report: str) -> tuple[Path, ...]:
    """The files that a report is rendered from, in HTML and Markdown.

    Args:
        report: `report` or `comparison`.
    """
    return tuple(TEMPLATES / name for name in (f"{report}.html.j2", f"{report}.md.j2", "style.css.j2"))
