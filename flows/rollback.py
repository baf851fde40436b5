"""Put the model that was in use before back into use: `llama3-grit rollback`, with the options of the run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from pydantic_settings import SettingsConfigDict
from rich.console import Console
from rich.table import Table

from flows.support.command_line import CommandLine, exit_status, parse
from tasks.engine.artifacts import Store
from tasks.ollama.names import model_name
from tasks.ollama.rollback import Version, Versions
from tasks.settings.presets import load_settings


class RollbackLine(CommandLine):
    """Put a former version of a model back into use. Other options name the model, as in the run that made it."""

    model_config = SettingsConfigDict(cli_prog_name="llama3-grit rollback")

    to: str | None = None
    """The version's tag; none for the one that was in use before."""
    plan: bool = False
    """List the versions that Ollama has; change nothing."""


def show(versions: list[Version], name: object) -> None:
    """Print a table of versions, wide enough for their names also where no terminal is."""
    console = Console() if sys.stdout.isatty() else Console(width=200)
    if not versions:
        console.print(f"No versions of {name} are known here.", highlight=False)
        return
    table = Table("version", "state", "judgement", "digest")
    for version in versions:
        table.add_row(str(version.name), version.state, version.note, version.digest[:12])
    console.print(table)


def run(arguments: Sequence[str] | None = None) -> int:
    """Roll back; return the exit status: 0, or 2 for something the user can put right."""

    def act() -> None:
        words = list(sys.argv[1:] if arguments is None else arguments)
        preset, plan, given = parse(words, RollbackLine)
        to: Any = given.pop("to", None)
        settings = load_settings(preset, given)
        versions = Versions(settings.ollama, model_name(settings), Store(settings.store, settings.store_uri))
        if not plan:
            left, taken = versions.roll_back(to)
            note = f"{versions.name} is {taken} now"
            note += f"; {left} is not promoted again unless you name it by --to." if left else "."
            Console(width=200).print(note, highlight=False)
        show(versions.all(), versions.name)

    return exit_status(act)


if __name__ == "__main__":
    sys.exit(run())
