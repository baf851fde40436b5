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
from subprocess import CompletedProcess, TimeoutExpired
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.support.preloaded"])
STARTERS = ("tasks.export.converter", "tasks.llamacpp.load")
"""The product's modules that start programs."""


def call(function: Callable[..., object], *arguments: Any, timeout: float | None = None) -> CompletedProcess[str]:
    """Call a function in a fork; returns its exit status and what it printed.

    Args:
        function: one that can be imported.
        arguments: its own.
        timeout: in seconds, after which it is killed, as `subprocess.run` does.
    """
    with tempfile.TemporaryDirectory() as directory:
        texts = [Path(directory, name) for name in ("stdout", "stderr")]
        process = FORKS.Process(target=_printing_into, args=(texts, function, *arguments))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutExpired([], timeout or 0)
        return CompletedProcess([], process.exitcode, *(text.read_text(errors="replace") for text in texts))


def run(
    command: Sequence[str], *, env: Mapping[str, str], timeout: float | None = None, **_how: Any
) -> CompletedProcess[str]:
    """Stand in for `subprocess.run` where it captures the texts of a Python program.

    Args:
        command: the interpreter, then `-m` and a module or else a script, then the program's arguments.
        env: the program's environment.
        timeout: in seconds.
    """
    return call(_become, list(command[1:]), dict(env), timeout=timeout)


def patch_starters(patch: pytest.MonkeyPatch) -> None:
    """Have the product fork its programs.

    Args:
        patch: ends it.
    """
    names = {"run": run, "CompletedProcess": CompletedProcess, "TimeoutExpired": TimeoutExpired}
    for module in STARTERS:
        patch.setattr(f"{module}.subprocess", SimpleNamespace(**names))


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
