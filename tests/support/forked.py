"""Processes that are forked from one with torch, Transformers and TRL, whose imports take seconds.

The product starts its programs by `subprocess.run`, as tests/test_convert.py does.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.support.preloaded"])
STARTERS = ("tasks.export.converter", "tasks.llamacpp.load")
"""The product's modules that start programs."""


def call(function: Callable[..., object], *arguments: Any) -> CompletedProcess[str]:
    """Call a function in a fork; returns its exit status and what it printed.

    Args:
        function: one that can be imported.
        arguments: its own.
    """
    with tempfile.TemporaryDirectory() as directory:
        texts = [Path(directory, name) for name in ("stdout", "stderr")]
        process = FORKS.Process(target=_printing_into, args=(texts, function, *arguments))
        process.start()
        process.join()
        assert process.exitcode is not None
        return CompletedProcess([], process.exitcode, *(text.read_text(errors="replace") for text in texts))


def run(command: Sequence[str], *, env: Mapping[str, str], **_how: Any) -> CompletedProcess[str]:
    """Stand in for `subprocess.run` where it captures the texts of a Python program.

    Args:
        command: the interpreter, then `-m` and a module or else a script, then the program's arguments.
        env: the program's environment.
    """
    return call(_become, list(command[1:]), dict(env))


def patch_starters(patch: pytest.MonkeyPatch) -> None:
    """Have the product fork its programs.

    Args:
        patch: ends it.
    """
    for module in STARTERS:
        patch.setattr(f"{module}.subprocess", SimpleNamespace(run=run, CompletedProcess=CompletedProcess))


def _printing_into(texts: list[Path], function: Callable[..., object], *arguments: Any) -> None:
    for number, text in enumerate(texts, 1):
        os.dup2(os.open(text, os.O_WRONLY | os.O_CREAT), number)
    function(*arguments)


def _become(words: list[str], environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    path = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if words[0] == "-P":  # the current directory is on no fork's path
        words = words[1:]
    if words[0] == "-m":
        sys.argv, sys.path[:0] = words[1:], path
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[:0] = words, [str(Path(words[0]).parent), *path]
        runpy.run_path(words[0], run_name="__main__")
