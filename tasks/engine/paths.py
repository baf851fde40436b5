"""Where the project's files are."""

from __future__ import annotations

from pathlib import Path

from tasks.engine.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
"""The checkout; of an installed package the directory that holds `tasks`, `flows` and `grit`."""
MARKS = ("presets", "modelfiles", "flows/command.py", "tasks/engine/paths.py")
"""What a checkout has, and an installed package has not all of."""


def is_checkout(directory: Path) -> bool:
    """Whether a directory is a checkout of the project."""
    return all((directory / mark).exists() for mark in MARKS)


def find_checkout(given: str | None, by: str = "--project ") -> Path:
    """The checkout to work with: the one given, or this code's own, or the one around the current directory.

    Args:
        given: a directory that the user names, if any.
        by: what it is named by, as it stands before the directory.

    Raises:
        UserError: it is no checkout, or there is none.
    """
    if given:
        directory = Path(given).expanduser().resolve()
        if not is_checkout(directory):
            fix = "Name the directory that `git clone` has made, with `presets` and `flows` in it."
            raise UserError("no checkout of the project", where=f"{by}{given}", fix=fix)
        return directory
    here = Path.cwd().resolve()
    for directory in (REPOSITORY, here, *here.parents):
        if is_checkout(directory):
            return directory
    fix = "Change into a checkout, or name its directory by --project."
    raise UserError("no checkout of the project is here or above", where=here, fix=fix)


def project_path(path: Path) -> Path:
    """A path of a preset as an absolute one: it counts from the checkout, wherever the command is typed.

    Args:
        path: relative, absolute, or beginning with `~`. Of an installed package it counts from the current directory.
    """
    base = REPOSITORY if is_checkout(REPOSITORY) else Path.cwd()
    return base / path.expanduser()


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
