"""Commands that a user can paste into the shell from which this program was started."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

PROGRAM = "llama3-grit"
PROJECT = "LLAMA3_GRIT_PROJECT"
"""The environment variable that holds what `--project` was given."""


def typed(subcommand: str, words: Sequence[str] = ()) -> str:
    """A command of this project as text for the shell, with `--project` where the variable of it has led here.

    Args:
        subcommand: such as `chat`.
        words: its options.
    """
    from tasks.engine.paths import REPOSITORY  # imports what the command's own help does without

    script = beside_python(PROGRAM)
    program = [as_typed(script)] if script.is_file() else [as_typed(Path(sys.executable)), "-P", "-m", "flows.command"]
    project = ["--project", str(REPOSITORY)] if os.environ.get(PROJECT) == str(REPOSITORY) else []
    return shlex.join([*program, *project, subcommand, *words])


def beside_python(name: str) -> Path:
    """A program of the environment that this process runs in, whether it is there or not."""
    return Path(sys.executable).with_name(name)


def as_typed(program: Path) -> str:
    """The shortest text by which the shell finds a program: its name if `PATH` leads to it, or else its path.

    Args:
        program: with its directory. Below the current directory its path is relative.
    """
    on_path = shutil.which(program.name)
    if on_path and program.exists() and program.samefile(on_path):
        return program.name
    if program.is_relative_to(Path.cwd()):
        relative = str(program.relative_to(Path.cwd()))
        return relative if os.sep in relative else os.path.join(os.curdir, relative)  # noqa: PTH118, keeps the dot
    return str(program)


def next_lines(commands: Sequence[str], needed: str = "") -> str:
    """What to type next, each command on a line of its own.

    Args:
        commands: one, or two of which the first keeps its terminal.
        needed: what must be there for them, such as `Ollama 0.30 or newer`.
    """
    start = f"Next, with {needed}" if needed else "Next"
    headings = [f"{start}:"] if len(commands) == 1 else [f"{start}, in one terminal:", "and in another:"]
    return "\n".join(f"{heading}\n  {command}" for heading, command in zip(headings, commands, strict=True))
