"""The commands `serve`, `down` and `recover`: they set up Prefect's environment, and only then import what uses it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from typing import NoReturn

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
    parser.add_argument("--port", type=_port, help=f"the server's, on 127.0.0.1 (default: that it had, or {PORT})")
    os.environ.update(environment(parser.parse_args(arguments).port))
    from flows.control import up

    return _exit_status(up)


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

    return _exit_status(stop)


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
    from flows.support.terminal import terminal_with
    from tasks.engine.errors import UserError

    def act() -> None:
        if get_current_settings().api.url is None:
            what = "it names no Prefect server, and none of this checkout has been started"
            raise UserError(what, where="PREFECT_API_URL", fix=f"Start one: {typed('serve')}")
        log = home() / "recover.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with terminal_with(log):
            lost = look()
        print(f"Lost runs: {lost}. Log: {log}")

    return _exit_status(act)


def _exit_status(act: Callable[[], None]) -> int:
    """Do what `exit_status` does, also where files, processes or the server refuse."""
    import httpx
    import psutil

    from flows.support.command_line import exit_status
    from tasks.engine.errors import UserError

    def guarded() -> None:
        try:
            act()
        except OSError as error:
            fix = "Free some space or give the right to it, or name another directory by PREFECT_HOME."
            raise UserError(error.strerror or str(error), where=error.filename or home(), fix=fix) from error
        except psutil.AccessDenied as error:
            what = "this process of the server or the worker is another user's"
            raise UserError(what, where=f"process {error.pid}", fix="Do it as that user.") from error
        except httpx.HTTPStatusError as error:
            what = f"the Prefect server answers with status {error.response.status_code}"
            raise UserError(what, where=error.request.url, fix=f"See {home()}/server.log") from error

    return exit_status(guarded)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    return _Parser(prog=f"{PROGRAM} {command}", description=description, allow_abbrev=False)


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text}: a port is a number from 1 to 65535")
    return int(text)
