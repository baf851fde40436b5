"""The command `llama3-grit`: it finds the project, and starts a subcommand. `python -m flows.command` is the same.

Each subcommand is imported only when it is asked for, after its environment is set: Prefect and torch take seconds.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple, NoReturn

from flows.support.leaving import interrupted, leave
from flows.support.pasting import PROGRAM, PROJECT, typed


class Subcommand(NamedTuple):
    """What a subcommand does, and the function that does it with the words that follow its name."""

    help: str
    module: str
    function: str = "run"

    def load(self) -> Callable[[Sequence[str]], int]:
        """Import the function. It returns the exit status."""
        function: Callable[[Sequence[str]], int] = getattr(importlib.import_module(self.module), self.function)
        return function


SUBCOMMANDS = {
    "finetune": Subcommand("fine-tune a model; without options the demo, by GRIT", "flows.finetune", "command"),
    "compare": Subcommand("train by several methods and seeds, and report which is better", "flows.compare"),
    "chat": Subcommand("talk to the model that a run has made, no Ollama needed", "flows.chat"),
    "rollback": Subcommand("put a former version of a model back into use", "flows.rollback"),
    "prune": Subcommand("remove outputs that the newest models do not need, after asking", "flows.prune"),
    "serve": Subcommand("start a Prefect server and a worker in the background", "flows.serving", "serve"),
    "down": Subcommand("stop them; runs keep their checkpoints", "flows.serving", "down"),
    "recover": Subcommand("schedule runs again that crashed, or whose machine died", "flows.serving", "recover"),
}


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Start a subcommand, and leave Python with its exit status: 2 where there is no such command or project."""
    try:
        status = start(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        status = interrupted()
    leave(status)


def start(arguments: Sequence[str]) -> int:
    """Do what the words after the program's name say, and return the exit status.

    Args:
        arguments: `--project DIR` may stand among them before or after the subcommand's name.
    """
    try:
        project, words = project_and_words(arguments)
    except argparse.ArgumentError as error:
        return _error(f"{error}. Name the directory of a checkout.")
    name, *options = words or [""]
    if name in ("", "-h", "--help"):
        print(overview())
        return 0 if name else 2
    if name == "--version":
        return _version()
    if name not in SUBCOMMANDS:
        near = difflib.get_close_matches(name, SUBCOMMANDS, n=1)
        fix = f"Did you mean {near[0]}?" if near else f"List them: {typed('--help')}"
        return _error(f"{name}: no such command. {fix}")
    return _enter(project, words) or SUBCOMMANDS[name].load()(options)


def project_and_words(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The project's directory, if one is named here or in the environment, and the words without it.

    Raises:
        argparse.ArgumentError: `--project` without a directory.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--project", default=os.environ.get(PROJECT) or None)
    options, words = parser.parse_known_args(arguments)
    return options.project, words


def _enter(project: str | None, words: list[str]) -> int:
    """Go on with the code of the project that is to be used, in place of this process if that is not its code.

    Args:
        project: as the user has named it, if at all.
        words: what it is to do.

    Returns:
        0, or 2 where there is no such project.
    """
    from tasks.engine.errors import UserError
    from tasks.engine.paths import REPOSITORY, find_checkout

    try:
        checkout = find_checkout(project, f"{PROJECT}=" if project == os.environ.get(PROJECT) else "--project ")
    except UserError as error:
        return _error(str(error))
    if project or checkout != REPOSITORY:
        os.environ[PROJECT] = str(checkout)
    if checkout != REPOSITORY:
        paths = [str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        os.execv(sys.executable, [sys.executable, "-P", "-m", "flows.command", *words])  # noqa: S606, no shell
    return 0


def overview() -> str:
    """The help of the program as a whole."""
    lines = [f"  {name:10}{subcommand.help}" for name, subcommand in SUBCOMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} [--project DIR] COMMAND ...",
            "",
            "Fine-tune a language model with LoRA, by AdamW or GRIT, and put it into Ollama.",
            "",
            *lines,
            "",
            f"  {PROGRAM} COMMAND --help   its options",
            "  --project DIR   the checkout to work with, before or after COMMAND; by default the one that this",
            f"                  command was installed from, or the one around this directory; {PROJECT}",
            "                  in the environment does the same",
            "  --version       the version",
        ]
    )


def _version() -> int:
    try:
        print(f"{PROGRAM} {version(PROGRAM)}")
    except PackageNotFoundError:
        return _error(f"{PROGRAM} is not installed, so it has no version. Install it: pip install --editable DIR")
    return 0


def _error(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
