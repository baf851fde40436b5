"""llama.cpp's converter in forks of one process that has imported what it needs.

The script, its arguments and what it prints are those of a process of its own.
"""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.forks import ForkServer, serve


@contextlib.contextmanager
def warm_converter() -> Iterator[None]:
    """Conversions of this process are forks; another converter than the first gets processes of its own."""
    servers: dict[tuple[str, str], ForkServer] = {}

    def run(command: list[str], *, env: dict[str, str], **options: Any) -> subprocess.CompletedProcess[str]:
        paths = env["PYTHONPATH"]
        key = command[1], paths
        if not servers:
            servers[key] = ForkServer("tests.support.warm_converter", command[1], PYTHONPATH=paths)
        if key not in servers:
            return subprocess.run(command, env=env, **options)
        return servers[key].run(arguments=command[1:], environment=env)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tasks.export.converter.subprocess", SimpleNamespace(run=run))
        yield
    for server in servers.values():
        server.close()


def convert(arguments: list[str], environment: dict[str, str]) -> None:
    """One conversion.

    Args:
        arguments: the script and its command line.
        environment: all of it.
    """
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def main() -> None:
    """Import all that the converter needs, by having it tell of its options."""
    sys.argv = [sys.argv[1], "--help"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        runpy.run_path(sys.argv[0], run_name="__main__")
    serve(convert)


if __name__ == "__main__":
    main()
