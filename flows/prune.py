"""Remove from the store what is no longer needed: `llama3-grit prune`; it shows what would go, and asks."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict
from rich.console import Console
from rich.prompt import Confirm
from rich.table import Table

from flows.support.leaving import interrupted
from tasks.engine.artifacts import Store
from tasks.engine.errors import TemporaryError, UserError
from tasks.engine.paths import project_path
from tasks.runs.pruning import find_waste, kept_comparisons, kept_runs, remove
from tasks.settings.presets import settings_error


class Prune(BaseSettings):
    """Remove what the newest finished runs do not need, after showing it and asking."""

    model_config = SettingsConfigDict(
        cli_prog_name="llama3-grit prune",
        env_prefix="LLAMA3_GRIT_PRUNE_",  # without one, any YES in the environment would remove without asking
        cli_implicit_flags=True,
        cli_kebab_case=False,
        use_attribute_docstrings=True,
    )

    store: Path = Path(".artifacts")
    """The directory of all outputs; by default the project's."""
    store_uri: str | None = None
    """The address where they are kept for other machines too, if any."""
    keep: Annotated[int, Field(ge=1)] = 3
    """How many models of each Ollama name stay, with all that made them; and how many comparisons."""
    hours: Annotated[float, Field(ge=0)] = 24
    """What was used in the last hours stays: a run may be at it."""
    yes: bool = False
    """Do not ask."""

    def cli_cmd(self) -> None:
        """Show, ask, remove."""
        own = "store" not in self.model_fields_set
        root = project_path(self.store) if own else self.store.expanduser().absolute()
        store, console = Store(root, self.store_uri), Console()
        runs = kept_runs(store, self.keep)
        waste = find_waste(store, self.keep, self.hours)
        for run in runs:
            console.print(f"kept: {run.model}, registered {run.at:%Y-%m-%d %H:%M} UTC")
        for comparison in kept_comparisons(store, self.keep):
            methods = ", ".join(comparison.methods)
            console.print(f"kept: comparison of {methods} on {comparison.model}, {comparison.at:%Y-%m-%d %H:%M} UTC")
        if not waste:
            console.print("Nothing to remove.")
            return
        sums: dict[tuple[str, str, str], list[int]] = defaultdict(list)
        for entry in waste:
            sums["the URI" if entry.at_uri else "here", entry.name.partition("/")[0], entry.why].append(entry.bytes)
        table = Table("at", "in", "why", "number", "MB", title=f"to remove from {store.root}")
        for (place, directory, why), sizes in sums.items():
            table.add_row(place, directory, why, str(len(sizes)), f"{sum(sizes) / 1e6:.1f}")
        console.print(table)
        if self.yes or Confirm.ask(f"Remove {sum(entry.bytes for entry in waste) / 1e9:.2f} GB?", default=False):
            still = find_waste(store, self.keep, self.hours)  # a run may have begun while nobody answered
            shown = {(entry.name, entry.at_uri) for entry in waste}
            remove(store, [entry for entry in still if (entry.name, entry.at_uri) in shown])
            console.print("Removed.")


def run(arguments: Sequence[str] | None = None) -> int:
    """Prune; return the exit status: 0, or 2 for something the user can put right."""
    try:
        CliApp.run(Prune, cli_args=list(sys.argv[1:] if arguments is None else arguments))
    except ValidationError as error:
        print(f"error: {settings_error(error, 'command line')}", file=sys.stderr)
        return 2
    except (UserError, TemporaryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return interrupted()
    except EOFError:
        print("error: nobody answers. Use --yes to remove without being asked.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run())
