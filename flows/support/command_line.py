"""The command line of a flow: preset, method, `--plan`, and an option for every setting."""

from __future__ import annotations

import difflib
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml
from prefect.settings import get_current_settings
from pydantic import BaseModel
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict, SettingsError
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from flows.support.database import check_database_of_temporary_server
from flows.support.leaving import interrupted
from flows.support.own_server import address, home
from flows.support.pasting import next_lines, typed
from flows.support.terminal import terminal_for
from tasks.engine.artifacts import Store
from tasks.engine.errors import TemporaryError, UserError
from tasks.engine.planning import planning
from tasks.ollama.next_commands import needed, next_commands
from tasks.promote import outcome
from tasks.runs.base_model import check_base_model
from tasks.runs.estimate import estimate
from tasks.runs.preflight import check_registry, check_settings
from tasks.settings.finetune import FinetuneSettings
from tasks.settings.presets import load_settings
from tasks.settings.renamed import renamings


class CommandLine(BaseSettings, FinetuneSettings):
    """Fine-tune a model and register it with Ollama. Options replace single values of the preset.

    Without any option, the demo is fine-tuned by GRIT.
    """

    model_config = SettingsConfigDict(
        cli_prog_name="llama3-grit finetune",
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_parse_none_str="null",
    )

    preset: str = "demo"
    """A name in presets/, or the path of a YAML file."""
    plan: bool = False
    """Print the settings, what is cached, and the estimated disk and time; run nothing."""


def parse(arguments: Sequence[str], options: type[BaseSettings] = CommandLine) -> tuple[str, bool, dict[str, Any]]:
    """Read the command line.

    Args:
        arguments: without the program's name.
        options: what may be given; `preset` and `plan` among it.

    Returns:
        The preset, whether only to plan, and the settings given, nested.

    Raises:
        UserError: an option that does not exist, or has no value.
    """
    try:
        given = CliSettingsSource(options, cli_parse_args=list(arguments), cli_exit_on_error=False)()
    except SettingsError as error:
        what = str(error).removeprefix("error parsing CLI: ")
        names = (word[2:].removeprefix("no-").partition("=")[0] for word in arguments if word.startswith("--"))
        what = "; ".join(text for name in names for text in renamings(name)) or what
        raise UserError(what, where="command line", fix=_meant(what, options)) from None
    return str(given.pop("preset", "demo")), str(given.pop("plan", False)) == "True", _from_here(given)


def _from_here(given: dict[str, Any]) -> dict[str, Any]:
    """Directories for outputs as absolute paths: typed ones count from the current directory, a preset's do not."""
    for section, name in ((given, "store"), (given.get("ollama"), "models")):
        if isinstance(section, dict) and name in section:
            section[name] = str(Path(section[name]).expanduser().absolute())
    return given


def _meant(what: str, options: type[BaseModel]) -> str:
    if re.search(r"(unrecognized arguments: |ignored explicit argument ')(true|false)\b", what, re.IGNORECASE):
        return "A switch takes no value: --section.name is true, --no-section.name is false."
    names = [f"--{name}" for name in _dotted(options)]
    near = [name for word in what.split() for name in difflib.get_close_matches(word.partition("=")[0], names, n=1)]
    return f"Did you mean {', '.join(near)}?" if near else "`--help` lists every setting."


def _dotted(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _dotted(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def show_plan(settings: FinetuneSettings, stages: Callable[[FinetuneSettings], Any]) -> None:
    """Print the resolved settings, the state of each stage, and the estimates."""
    with planning() as plan:
        stages(settings)
    console = Console()
    console.print(Syntax(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False), "yaml"))
    table = Table("stage", "state", title=f"{settings.method} on {settings.model.name}")
    for name, state in plan.stages:
        table.add_row(name, state)
    console.print(table)
    check_base_model(settings.model, plan)
    for line in estimate(settings, plan):
        console.print(line)
    if warning := check_registry(settings.ollama):
        console.print(warning)


class _StoppedError(Exception):
    """Ctrl-C or SIGTERM; its argument is the signal's number."""


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into `_StoppedError` when the flow has ended.

    Ctrl-C reaches Prefect's temporary server as well, so that nobody should wait for its answers any longer.
    """
    stopped: int | None = None

    def stop(number: int, frame: Any) -> None:
        nonlocal stopped
        stopped = number
        get_current_settings().client.max_retries = 0
        signal.default_int_handler(number, frame)

    former = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except BaseException as error:
        if stopped:
            raise _StoppedError(stopped) from error
        raise
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def run(
    flow: Callable[..., Any], stages: Callable[[FinetuneSettings], Any], arguments: Sequence[str] | None = None
) -> int:
    """Run a flow from the command line and return the exit status.

    It is 0, 2 for something the user can put right, or 130 after Ctrl-C and 143 after SIGTERM, as shells count.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)

    def act() -> None:
        preset, plan, overrides = parse(words)
        settings = load_settings(preset, overrides)
        if plan:
            show_plan(settings, stages)
            return
        check_settings(settings)  # before a server is started for the flow, which takes many seconds
        check_database_of_temporary_server()
        print(f"Preset {preset}: {settings.method} on {settings.model.name}. Ctrl-C is safe at any time.", flush=True)
        method = overrides.pop("method", settings.method)
        with terminal_for("finetune", Store(settings.store)) as log, stopping_at_once():
            finished = flow(preset, method, overrides)
        commands = next_commands(finished.registration, finished.promotion)
        print(f"\n{next_lines(commands, needed(finished.registration))}")
        print(f"Chat, without Ollama:\n  {typed('chat', words)}")
        print(f"Report: {finished.report.path / 'report.html'}")
        print(f"Log:    {log}")
        print(f"Model:  {outcome(finished.registration, finished.promotion)}")

    return exit_status(act)


def exit_status(act: Callable[[], None]) -> int:
    """Do what a command does, and turn its end into an exit status, with one line where something went wrong.

    Args:
        act: what to do, with flows run within `stopping_at_once`.
    """
    try:
        act()
    except _StoppedError as error:
        print("stopped: the same command goes on where this one was; finished stages are cached", file=sys.stderr)
        return 128 + int(error.args[0])
    except KeyboardInterrupt:
        return interrupted()
    except (UserError, TemporaryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, httpx.TransportError) as error:
        if isinstance(error, RuntimeError) and "Failed to reach API" not in str(error):
            raise
        server = get_current_settings().api.url
        is_own = server is not None and server == address(home())
        fix = f"Start it: {typed('serve')}" if is_own else "Start it, or unset PREFECT_API_URL."
        print(f"error: {server}: no Prefect server answers. {fix}", file=sys.stderr)
        return 2
    return 0
