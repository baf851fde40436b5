"""The commands `serve`, `down` and `recover`: they set up Prefect's environment, and only then import what uses it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from flows.support.own_server import PORT, address, environment, home
from flows.support.pasting import PROGRAM, typed


def serve(arguments: Sequence[str]) -> int:
    """Start what does not run, and return the exit status."""
    parser = _parser(
        "serve",
        "Start a Prefect server of this checkout and a worker in the background, register the deployments of "
        "prefect.yaml, and repeat lost runs. What runs already stays. Database and logs are in .prefect, or in "
        "PREFECT_HOME.",
    )
    parser.add_argument("--port", type=int, help=f"the server's, on 127.0.0.1 (default: that it had, or {PORT})")
    os.environ.update(environment(parser.parse_args(arguments).port))
    from flows.control import up

    up()
    return 0


def down(arguments: Sequence[str]) -> int:
    """Stop worker and server, and return the exit status."""
    parser = _parser(
        "down",
        "Stop the worker and the server that `serve` has started. Runs write a checkpoint first; the next `serve` goes "
        "on with them.",
    )
    parser.parse_args(arguments)
    os.environ.update(environment(None))
    from flows.control import down as stop

    stop()
    return 0


def recover(arguments: Sequence[str]) -> int:
    """Look for lost runs once; return the exit status: 0, or 2 where there is no server to look at."""
    parser = _parser(
        "recover",
        "Look once for runs of deployments that crashed, or whose machine died, and schedule them again. The server is "
        "that of PREFECT_API_URL, or else the one that `serve` has started.",
    )
    parser.parse_args(arguments)
    if (own := address(home())) is not None:
        os.environ.setdefault("PREFECT_API_URL", own)
    from prefect.settings import get_current_settings

    from flows.recover import recover as look
    from flows.support.command_line import exit_status
    from flows.support.terminal import terminal_with

    if get_current_settings().api.url is None:
        print(f"error: no Prefect server is set. Start one, or set PREFECT_API_URL: {typed('serve')}", file=sys.stderr)
        return 2

    def act() -> None:
        log = home() / "recover.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with terminal_with(log):
            lost = look()
        print(f"Lost runs: {lost}. Log: {log}")

    return exit_status(act)


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"{PROGRAM} {command}", description=description, allow_abbrev=False)
