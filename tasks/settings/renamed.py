"""What settings of earlier versions are called now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

RENAMED: dict[str, str] = {}
"""What a preset may still hold, and what to write in its place.

A row's key is a setting, `training.steps`, a section, or a setting's value, `grit.variant=kfac2`. Settings of a
comparison have no section. The value is the present setting or `setting=value`; where there is none, a sentence without
a full stop that says what to do."""


def renamings(name: str, value: object = None) -> Iterator[str]:
    """What to say of an unknown setting or value, and of what stands below it; nothing if no version had it.

    Args:
        name: of the setting or section, with dots.
        value: what was given for it.
    """
    for former in (name, f"{name}={value}"):
        if (present := RENAMED.get(former)) is not None:
            yield f"{former}: {present}" if " " in present else f"{former}: renamed to {present}"
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield from renamings(f"{name}.{key}", below)
