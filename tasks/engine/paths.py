"""Where the project's files are."""

from __future__ import annotations

from pathlib import Path

from tasks.engine.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
"""The checkout; of an installed package the directory that holds `tasks`, `flows` and `grit`."""


def checkout_directory(name: str) -> Path:
    """A directory that a checkout has and an installed package has not.

    Args:
        name: `presets` or `modelfiles`.

    Raises:
        UserError: it is not there.
    """
    directory = REPOSITORY / name
    if not directory.is_dir():
        fix = "Work in a checkout of the project, installed with `make setup` or `pip install --editable .`."
        raise UserError(
            "only a checkout has this directory, and this is an installed package", where=directory, fix=fix
        )
    return directory
